"""Launch files are checked before anything is started (training/engines/launch_file.py)."""

import dataclasses
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from baton.launched import own_words
from baton.runner import run_pipeline
from handoff.errors import UserError
from training.engines import launch_file
from training.engines.launch import LaunchError
from training.engines.launch_file import check_launch_file
from training.recipe import load_recipe

GOOD = """\
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
gpu_ids: "-1,-1"
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "1: is empty"),
        ("- a\n", "1: must hold keys: distributed_type"),
        ("a:\n\tb: 1\n", "2: not valid YAML"),
        (GOOD + "num_proceses: 3\n", "6: num_proceses: accelerate has no such key, did you mean num_processes?"),
        (GOOD + "gpu_ids: all\n", "6: gpu_ids: given twice, first in line 5"),
        (GOOD.replace("2", "two"), "3: num_processes: expected a whole number, not 'two'"),
        (GOOD.replace("2", "2.0"), "3: num_processes: expected a whole number, not 2.0"),
        (GOOD.replace("2", "true"), "3: num_processes: expected a whole number, not True"),
        (GOOD.replace("2", "0"), "3: num_processes: 0 processes cannot be started"),
        (GOOD.replace('"-1,-1"', "0"), "5: gpu_ids: expected text, not 0; put it in quotes"),
        (GOOD.replace('"-1,-1"', '"0"'), "5: gpu_ids: MULTI_GPU needs two GPUs or more on one machine"),
        ("num_processes: 2\n", "1: distributed_type: missing; there are NO, MULTI_GPU, DEEPSPEED, FSDP"),
        ("distributed_type: MULTI_GPU\n", "1: num_processes: missing"),
        (GOOD.replace("MULTI_GPU", "MULTI_CPU"),
         "1: distributed_type: Baton does not run MULTI_CPU, did you mean MULTI_GPU"),
        (GOOD.replace("MULTI_GPU", "DEEPSPEED") + "deepspeed_config: {zero_stge: 3}\n",
         "6: deepspeed_config.zero_stge: accelerate has no such key, did you mean zero_stage?"),
        (GOOD.replace("MULTI_GPU", "FSDP") + "fsdp_config: [2]\n", "6: fsdp_config: expected keys and values, not [2]"),
        (GOOD + "rdzv_backend: c10d\n", "6: rdzv_backend: accelerate reads this key from its command line alone"),
        (GOOD.replace("num_machines: 1", "num_machines: 2").replace("processes: 2", "processes: 3"),
         "3: num_processes: 3 processes cannot be shared evenly by 2 machines"),
        (GOOD.replace("num_machines: 1", "num_machines: 2").replace("rank: 0", "rank: 2"),
         "4: machine_rank: 2 machines have the numbers 0 to 1"),
        (GOOD + "main_process_port: 70000\n", "6: main_process_port: 70000 is no port; ports go up to 65535"),
        (GOOD + "compute_environment: AMAZON_SAGEMAKER\n", "6: compute_environment: Baton runs on LOCAL_MACHINE"),
    ],
)  # fmt: skip
def test_mistakes_name_file_line_and_key(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(LaunchError) as error:
        check_launch_file(path)
    assert str(error.value).startswith(f"{path}:{found}")


def test_every_launch_file_of_the_repository_passes(root: Path) -> None:
    paths = sorted((root / "recipes" / "launch").glob("*.yaml"))
    assert len(paths) > 8
    for path in paths:
        check_launch_file(path)


def test_what_accelerates_own_questions_write_passes(tmp_path: Path) -> None:
    """As `accelerate config` writes it for FSDP."""
    path = tmp_path / "launch.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: FSDP\ndowncast_bf16: 'no'\n"
        "enable_cpu_affinity: false\nfsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n"
        "machine_rank: 0\nmain_training_function: main\nmixed_precision: bf16\nnum_machines: 1\nnum_processes: 4\n"
        "rdzv_backend: static\nsame_network: true\ntpu_env: []\ntpu_use_cluster: false\ntpu_use_sudo: false\n"
        "use_cpu: false\n"
    )
    check_launch_file(path)


def test_the_keys_are_those_of_accelerate() -> None:
    ours = launch_file.WHOLE_NUMBERS | launch_file.TEXTS | launch_file.MAPPINGS | launch_file.OTHERS
    assert ours == {field.name for field in dataclasses.fields(ClusterConfig)}
    options = {action.dest for action in launch_command_parser()._actions}
    assert options >= launch_file.DEEPSPEED
    assert {name for name in options if name.startswith("fsdp_")} == launch_file.FSDP


def test_a_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nstages: {tokenizer: {data: [{source: world, kind: documents}]}}\n")
    (tmp_path / "launch.yaml").write_text(GOOD + "wrong: 1\n")
    recipe = load_recipe(tmp_path / "r.yaml", [f"output_root={tmp_path / 'runs'}"])
    with pytest.raises(UserError, match=r"launch\.yaml:6: wrong: accelerate has no such key"):
        run_pipeline(recipe, [], [], tmp_path / "launch.yaml", dry_run=False)
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_fails_by_itself_is_heard() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "x/accelerate/commands/launch.py", line 1423, in <module>',
        "OSError: Address already in use",
    ]
    assert own_words(lines, 1) == (lines[-1:], 1)
