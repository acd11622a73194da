"""Launch files: the requested engine, refused requests, and the resulting settings."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from training import engines
from training.config import TrainConfig
from training.engines import deepspeed, launch
from training.engines.ddp import Ddp
from training.engines.deepspeed import DeepSpeed
from training.engines.fsdp2 import Fsdp2
from training.engines.launch import LaunchError, Request, check_environment, requested, say_error
from training.engines.meeting import saying
from training.engines.single import Single, micro_batch
from training.threads import SPIN_ROUNDS

ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}
TWO = {**ACCELERATE, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
# Variables that accelerate sets for DeepSpeed even if the launch file does not.
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REHEARSAL = {"CUDA_VISIBLE_DEVICES": "-1,-1"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets all variables that a launcher may set; also undoes those that the code under test sets."""
    before = dict(os.environ)

    def apply(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "CUDA_", "OMP_", "PMI_", "OMPI_", "TORCH_EXT")) or (
                name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "DS_ACCELERATOR")
            ):
                del os.environ[name]
        os.environ.update(variables)

    yield apply
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Makes torch find this many GPUs."""
    import torch

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    pretend(0)
    return pretend


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Request("single", None, 1, "cpu")),
        ({**ACCELERATE, "ACCELERATE_USE_CPU": "True"}, Request("single", None, 1, "cpu")),
        ({**TWO, **REHEARSAL}, Request("ddp", None, 2, "cpu")),
        (TWO, Request("ddp", None, 2, "cuda")),
        ({**TWO, **ZERO3, **REHEARSAL}, Request("deepspeed", 3, 2, "cpu")),
        ({**TWO, **ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, Request("deepspeed", 2, 2, "cuda")),
        ({**TWO, **FSDP2, **REHEARSAL}, Request("fsdp2", None, 2, "cpu")),
        ({**TWO, **FSDP2, "WORLD_SIZE": "16"}, Request("fsdp2", None, 16, "cuda")),
    ],
)
def test_requested_engine(environment, gpus, variables: dict[str, str], expected: Request) -> None:
    environment(variables)
    assert requested() == expected


def test_one_process_uses_the_available_gpu(environment, gpus) -> None:
    environment({"CUDA_VISIBLE_DEVICES": "3,4"})
    gpus(2)
    assert engines.start().request == Request("single", None, 1, "cuda")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"  # two would be split over by transformers


def test_zero_stage_of_a_deepspeed_configuration_file(environment, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    environment({**TWO, **ZERO3, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert requested().zero_stage == 1
    file.write_text("{")
    with pytest.raises(LaunchError, match=r"ds\.json: cannot be read"):
        requested()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**ACCELERATE, "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "recipes/launch/cpu2.yaml"),
        ({"PMI_SIZE": "4"}, "recipes/launch/cpu2.yaml"),
        ({**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "write `fsdp_version: 2`"),
        ({**TWO, **ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage: 0"),
        ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({**TWO, **REHEARSAL, "ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision \(bf16\).*train\.bf16"),
        ({**TWO, **REHEARSAL, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"train\.torch_compile"),
        ({**TWO, **REHEARSAL, **ZERO3, "ACCELERATE_GRADIENT_CLIPPING": "0.3"}, r"0\.3.*train\.max_grad_norm"),
        ({**TWO, **ZERO3, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"train\.global_batch_size"),
    ],
)
def test_requests_that_are_refused(environment, gpus, variables: dict[str, str], message: str) -> None:
    environment(variables)
    with pytest.raises(LaunchError, match=message):
        engines.start()


PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE=two, and WORLD_SIZE is not a number; .*`unset WORLD_SIZE`"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"WORLD_SIZE=2, RANK=0 without MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", **PLACE}, r"there is no process 2 among 2"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, r"there is no process 3 among 1; .*`unset WORLD_SIZE RANK`"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}, r"LOCAL_RANK is not a number"),
    ],
)
def test_variables_of_an_earlier_job_are_refused(environment, variables: dict[str, str], message: str) -> None:
    environment(variables)
    with pytest.raises(LaunchError, match=message):
        check_environment()


def test_a_command_is_one_process_and_a_stage_may_be_several(environment) -> None:
    environment({**TWO, **PLACE})
    check_environment()
    with pytest.raises(
        LaunchError, match="WORLD_SIZE=2, RANK=1, LOCAL_RANK=1, as in a process that a launcher started"
    ):
        check_environment(launched=False)
    for variables in ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        environment(variables)
        check_environment(launched=False)


def test_a_process_says_for_whom_it_waits(environment, capfd) -> None:
    environment(PLACE)
    with saying(0.01, "waits for the other 1 of 2 processes"):
        time.sleep(0.5)
    with saying(30.0, "is not said"):
        pass
    said = "  waits for the other 1 of 2 processes at 127.0.0.1:1; if nothing else was started, unset WORLD_SIZE"
    assert capfd.readouterr().err == f"{said}, RANK and LOCAL_RANK\n"


@pytest.mark.parametrize(
    ("variables", "rehearsal"),
    [(TWO, "cpu2.yaml"), ({**TWO, **ZERO3}, "cpu2_zero3.yaml"), ({**TWO, **FSDP2}, "cpu2_fsdp2.yaml")],
)
def test_gpu_launch_file_without_a_gpu_names_its_rehearsal(environment, gpus, variables, rehearsal: str) -> None:
    environment(variables)
    with pytest.raises(LaunchError, match=f"recipes/launch/{rehearsal}") as caught:
        engines.start()
    assert (Path("recipes/launch") / rehearsal).name in str(caught.value)


def test_more_processes_than_gpus(environment, gpus) -> None:
    environment({**TWO, **FSDP2, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"})
    gpus(4)
    with pytest.raises(LaunchError, match=r"8 processes.*4 GPUs.*num_processes: 4"):
        engines.start()


def test_accelerates_own_clipping_is_off(environment, gpus) -> None:
    environment({**TWO, **ZERO3})
    gpus(2)
    engines.start()
    assert "ACCELERATE_GRADIENT_CLIPPING" not in os.environ
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ


@pytest.mark.parametrize(("missing", "remedy"), [("c++", "g[+][+]"), ("ninja", "pip install ninja")])
def test_missing_build_tool_is_named(environment, gpus, monkeypatch, missing: str, remedy: str) -> None:
    environment({**TWO, **ZERO3, **REHEARSAL})
    found = deepspeed.shutil.which
    monkeypatch.setattr(deepspeed.shutil, "which", lambda name: None if name == missing else found(name))
    with pytest.raises(LaunchError, match=remedy):
        engines.start()


def test_missing_deepspeed_is_named(environment, gpus, monkeypatch, tmp_path: Path) -> None:
    environment({**TWO, **ZERO3, **REHEARSAL, "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"pip install 'baton-align\[deepspeed\]'"):
        engines.start()


@pytest.mark.parametrize("folder", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])
def test_build_lock_is_removed_only_when_it_is_free(environment, gpus, tmp_path: Path, capfd, folder: str) -> None:
    environment({**TWO, **ZERO3, **REHEARSAL, "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    lock = tmp_path / folder / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("x"):
        engines.start()
        assert lock.exists()
    assert "removed" not in capfd.readouterr().err
    engines.start()
    assert not lock.exists()
    assert capfd.readouterr().err == f"removed {lock}, left by a build that was killed\n"


@pytest.mark.parametrize(
    ("total", "at_most", "processes", "rows"),
    [(32, 8, 1, 8), (32, 8, 4, 8), (32, 8, 8, 4), (30, 8, 2, 5), (8, 8, 2, 4), (14, 4, 2, 1), (64, 8, 64, 1)],
)
def test_the_micro_batch_is_the_largest_that_divides(total: int, at_most: int, processes: int, rows: int) -> None:
    assert micro_batch(total, at_most, processes) == rows


@pytest.mark.parametrize(("total", "processes"), [(32, 3), (4, 8)])
def test_a_batch_that_processes_cannot_share_is_refused(total: int, processes: int) -> None:
    with pytest.raises(LaunchError, match=f"global_batch_size that is a multiple of {processes}"):
        micro_batch(total, 1, processes)


def test_precision() -> None:
    gpu, cpu = Ddp(Request("ddp", None, 2, "cuda")), Single(Request("single", None, 1, "cpu"))
    cut = Fsdp2(Request("fsdp2", None, 2, "cpu"))
    assert gpu.choose_bf16("auto", supported=True) is True
    assert gpu.choose_bf16("auto", supported=False) is False
    assert cpu.choose_bf16("auto", supported=False) is False
    assert cpu.choose_bf16("auto", supported=True, width=256) is True
    assert cpu.choose_bf16("auto", supported=True, width=128) is False
    assert cpu.choose_bf16("auto", supported=False, width=256) is False
    assert cpu.choose_bf16("auto", supported=True) is False
    assert cut.choose_bf16("auto", supported=True, width=256) is False
    assert cpu.choose_bf16(False, supported=True, width=256) is False
    assert cpu.choose_bf16(True, supported=False) is True
    assert gpu.choose_bf16(False, supported=True) is False
    with pytest.raises(LaunchError, match="no bfloat16"):
        gpu.choose_bf16(True, supported=False)
    with pytest.raises(LaunchError, match="rehearsal of fsdp2"):
        cut.choose_bf16(True, supported=False)


def test_compilation() -> None:
    assert Ddp(Request("ddp", None, 8, "cuda")).choose_compile("auto") is True
    assert DeepSpeed(Request("deepspeed", 3, 8, "cuda")).choose_compile("auto") is False
    assert Single(Request("single", None, 1, "cpu")).choose_compile("auto") is False
    assert Single(Request("single", None, 1, "cpu")).choose_compile(True) is True


@pytest.mark.parametrize(
    ("variables", "use_cpu", "backend"),
    [
        ({"ACCELERATE_USE_CPU": "true"}, True, None),
        ({**TWO, **REHEARSAL}, True, "gloo"),
        ({**TWO, **REHEARSAL, **ZERO3}, False, "gloo"),
        ({**TWO, **REHEARSAL, **FSDP2}, False, "gloo"),
        (TWO, False, None),
    ],
)
def test_training_arguments(environment, gpus, variables: dict[str, str], use_cpu: bool, backend: str | None) -> None:
    environment(variables)
    train = TrainConfig(
        learning_rate=0.01, global_batch_size=32, per_device_train_batch_size=4, max_grad_norm=0.0, bf16=False
    )
    engine = engines.current()
    made = engine.training_arguments(train)
    assert made["gradient_accumulation_steps"] == 8 // engine.data_world
    assert (made["use_cpu"], made["ddp_backend"], made["max_grad_norm"]) == (use_cpu, backend, 0.0)
    assert made["activation_checkpointing"] is False  # TRL's own default is True


def test_every_argument_is_one_of_transformers(environment) -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    environment({"ACCELERATE_USE_CPU": "true"})
    made = engines.current().training_arguments(TrainConfig(learning_rate=0.01))
    assert made.keys() <= {field.name for field in fields(TrainingArguments)}


def test_launch_files(root: Path) -> None:
    """Each states its purpose and sets nothing that belongs to the recipe; every engine has a CPU counterpart."""
    from accelerate.commands.config.config_args import load_config_from_file

    files = {file.stem: file for file in (root / "recipes" / "launch").glob("*.yaml")}
    gpu = {"ddp", "zero2", "zero3", "fsdp2"}
    assert files.keys() == gpu | {"cpu", "cpu2", "ddp_2nodes", "cpu2_zero2", "cpu2_zero3", "cpu2_fsdp2"}
    for name, file in files.items():
        text = file.read_text()
        assert text.startswith("# ") and f"--config_file recipes/launch/{name}.yaml" in text
        load_config_from_file(str(file))  # accelerate's own check of the keys
        settings = yaml.safe_load(text)
        inner = {**settings.get("deepspeed_config", {}), **settings.get("fsdp_config", {})}
        assert not {"mixed_precision", "gradient_clipping", "gradient_accumulation_steps"} & {*settings, *inner}
        assert ("gpu_ids" in settings) == (name.startswith("cpu2"))
        assert settings.get("gpu_ids", launch.REHEARSAL) == launch.REHEARSAL
    for name in gpu:
        real, rehearsal = (yaml.safe_load(files[n].read_text()) for n in (name, f"cpu2_{name}".removesuffix("_ddp")))
        same = ("distributed_type", "deepspeed_config", "fsdp_config")
        assert [real.get(key) for key in same] == [rehearsal.get(key) for key in same]
        assert (real["num_processes"], rehearsal["num_processes"]) == (8, 2)


def check(processes: int) -> None:
    """What accelerate has brought up is an unwrapped model on so many processes."""
    import torch

    trainer = SimpleNamespace(
        model_wrapped=torch.nn.Linear(2, 2),
        accelerator=SimpleNamespace(num_processes=processes, device=torch.device("cpu"), gather=None),
    )
    engines.current().adopt(trainer)


def test_what_came_up_is_compared_with_what_was_asked(environment, gpus) -> None:
    environment({**TWO, **REHEARSAL, **ZERO3})
    with pytest.raises(
        LaunchError, match=r"asks for deepspeed ZeRO-3, 2 processes, cpu, .* came up is single, 1 process"
    ):
        check(1)
    environment({"ACCELERATE_USE_CPU": "true"})
    check(1)
    with pytest.raises(LaunchError, match="single, 2 processes"):
        check(2)
    environment({**TWO, **REHEARSAL})
    with pytest.raises(LaunchError, match="asks for ddp"):
        check(2)


COMMAND = """
import sys
from baton.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
except SystemExit:
    pass
"""
STARTS = ("pass", "from training import engines; engines.start()", COMMAND)


@pytest.mark.parametrize(
    ("asked", "dynamic", "spins"),
    [
        ({"OMP_DYNAMIC": "TRUE"}, ("TRUE", "FALSE", "FALSE"), (None, SPIN_ROUNDS, SPIN_ROUNDS)),
        ({"GOMP_SPINCOUNT": "77"}, ("FALSE", "FALSE", "FALSE"), (77, 77, 77)),
        ({"OMP_WAIT_POLICY": "passive"}, ("FALSE", "FALSE", "FALSE"), (0, 0, 0)),
    ],
)
def test_openmp_neither_counts_threads_by_load_nor_spins_for_long(root: Path, asked, dynamic, spins) -> None:
    """As torch's OpenMP library says itself, when it is loaded."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for start, number, rounds in zip(STARTS, dynamic, spins, strict=True):
        command = [sys.executable, "-c", f"{start}\nimport torch"]
        environment = {**kept, **asked, "OMP_DISPLAY_ENV": "VERBOSE"}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        said = dict(re.findall(r"(\w+) = '(\w+)'", done.stderr))
        if "GOMP_SPINCOUNT" not in said:
            pytest.skip(f"torch's OpenMP library is not GNU's: {done.stderr[-200:]}")
        assert said["OMP_DYNAMIC"] == number
        assert rounds is None or int(said["GOMP_SPINCOUNT"]) == rounds


# ---- errors


def test_an_error_that_every_process_finds_is_printed_once(tmp_path, monkeypatch, capsys):
    """The agent gives each process a file in one folder of the launch. An error of one process alone is printed too."""

    def fails(number: int, text: str) -> str:
        folder = tmp_path / "attempt_0" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        say_error(text)
        return capsys.readouterr().err

    assert fails(1, "recipe.yaml: no key schön") == "recipe.yaml: no key schön\n"
    assert fails(0, "recipe.yaml: no key schön") == ""
    assert fails(2, "GPU 2 is not there") == "GPU 2 is not there\n"
    for marker in (tmp_path / "attempt_0").glob("said-*"):
        marker.write_text("")  # as a process leaves it that was killed before it printed
    assert fails(0, "GPU 2 is not there") == "GPU 2 is not there\n"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    say_error("alone")
    say_error("alone")
    assert capsys.readouterr().err == "alone\nalone\n"
    shutil.rmtree(tmp_path / "attempt_0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    say_error("the launch is ending")
    assert capsys.readouterr().err == "the launch is ending\n"
