"""What an engine's processes hold in memory: pages of freed tensors, and a model while it is loaded."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import launched
from tests.stage_chain import foreign_checkpoint

# 400 tensors of 1 MiB; every second one is freed, so that a live tensor follows each gap.
LEAVE_GAPS = """
import sys
import torch
from training import engines
from training.engines import single

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

engine = engines.start()
if "another C library" in sys.argv:
    single.ctypes.CDLL = lambda name: object()
torch.ones(2**22).sum()  # a freed block of 16 MiB: from now on smaller ones come from the heap
tensors = [torch.ones(2**18) for _ in range(400)]
before = resident()
del tensors[::2]
gaps = resident()
engine.release_memory()
print(before, gaps, resident(), float(sum(tensor.sum() for tensor in tensors)))
"""


def _measure(*arguments: str) -> list[float]:
    command = [sys.executable, "-c", LEAVE_GAPS, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps the pages")
def test_freed_pages_are_returned_to_the_system() -> None:
    before, gaps, after, total = _measure()
    assert gaps > before - 20, "freeing alone returns them: the call has nothing left to do"
    assert after < gaps - 150
    assert total == 200 * 2**18


def test_another_c_library_is_left_alone() -> None:
    *_, total = _measure("another C library")
    assert total == 200 * 2**18


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, float]]:
    """A small model, one of 16 layers that takes 270 MB in float32, and the sums of the large one's tensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = foreign_checkpoint(tmp_path_factory.mktemp("small"))
    large = tmp_path_factory.mktemp("large")
    shutil.copytree(small, large, dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(small)
    config.update({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8})
    config.num_key_value_heads, config.head_dim = 8, 64
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(large)
    return small, large, {name: p.double().sum().item() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not measure peak memory")
@pytest.mark.parametrize("config", ["cpu2_zero3", "cpu2_fsdp2"])
def test_no_process_holds_the_whole_model_while_it_is_loaded(
    config: str, models: tuple[Path, Path, dict[str, float]], root: Path, tmp_path: Path
) -> None:
    small, large, sums = models
    done = launched(root, config, "tests.loading_shares", small, large, tmp_path / "seen.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    for part, found in seen.items():
        for whole in found["sums"]:
            assert whole == pytest.approx(sums, rel=1e-9)
        assert max(found["loaded"]) < 0.2, part
        # Under ZeRO-3 the buffers with which DeepSpeed trains take twice the whole model.
        assert (part == "trained" and config == "cpu2_zero3") or max(found["ready"]) < 0.9, part
