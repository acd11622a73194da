"""What an engine's processes hold in memory: pages of freed tensors, and a model while it is loaded."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import grouped
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


# Loads a frozen model on one process, reads all of its weights, and publishes it with an adapter merged.
LOAD_AND_PUBLISH = """
import sys
from pathlib import Path
import torch
from benchmarks.turns import forget_peak, resident
from handoff.parent import open_parent
from training import engines
from training.config import AdapterConfig, ModelArguments
from training.model import Model, load_encoder

engine = engines.start()

def load(folder):
    parent = open_parent(folder, Path(folder), {"causal_lm"})
    return Model.load(engine, parent, "policy", load_encoder(parent), ModelArguments(), dtype=None, frozen=True)

def read(folder):
    model = load(folder).freeze()
    for parameter in model.module.parameters():
        parameter.flatten()[::512].sum()  # its pages are in memory now
    return model

small, large, out = sys.argv[1:]
model = read(small).adapt(AdapterConfig(merge=True), 0)
model.write(Path(out), model.module)  # imports, and buffers of the libraries
size = sum(path.stat().st_size for path in Path(large).glob("*.safetensors"))
engine.release_memory()
before = forget_peak()
model = read(large)
loaded = resident("VmHWM") - before
model.adapt(AdapterConfig(merge=True, r=1), 0)
before = forget_peak()
model.write(Path(out), model.module)
print(loaded / size, (resident("VmHWM") - before) / size)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, float]]:
    """A small model, one of 16 layers whose files take 135 MB, and the sums of the large one's tensors."""
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
def test_a_frozen_model_takes_what_its_files_take(
    models: tuple[Path, Path, dict[str, float]], root: Path, tmp_path: Path
) -> None:
    """And it is published tensor by tensor, also with an adapter merged."""
    command = [sys.executable, "-c", LOAD_AND_PUBLISH, *models[:2], tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded, published = map(float, done.stdout.splitlines()[-1].split())
    assert loaded < 1.15
    assert published < 0.5  # the largest tensors, and files that are read for comparison


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not measure peak memory")
@pytest.mark.parametrize("config", ["cpu2_zero3", "cpu2_fsdp2"])
def test_no_process_holds_the_whole_model_while_it_is_loaded(
    config: str, models: tuple[Path, Path, dict[str, float]], root: Path, tmp_path: Path
) -> None:
    small, large, sums = models
    done = grouped(root, config, "tests.loading_shares", small, large, tmp_path / "seen.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    for part, found in seen.items():
        for whole in found["sums"]:
            assert whole == pytest.approx(sums, rel=1e-9)
        assert max(found["loaded"]) < 0.2, part
    # Of the files' size, half and a layer; a model of 0.5 B parameters takes 0.55 (ZeRO-3) and 0.57 (FSDP2).
    assert max(seen["frozen"]["ready"]) < 0.7
    # In float32. Under ZeRO-3 the buffers with which DeepSpeed trains take twice the whole model.
    assert config == "cpu2_zero3" or max(seen["trained"]["ready"]) < 1.8
