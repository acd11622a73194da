"""Training across two machines, whose cable is cut in the middle and joined again."""

import os
import shutil
import time

import pytest

from benchmarks.faults_setup import differences
from tests.two_nodes import ended, two_nodes
from training.recipe import load_recipe

pytestmark = pytest.mark.slow
TIMEOUT = 10
KEYS = {
    "sft": ("train.max_steps=40", "train.save_steps=5", "train.logging_steps=1"),
    "ppo": ("train.iterations=6",),
}


ALL = pytest.mark.skipif("BATON_RESUME" not in os.environ, reason="takes long: set BATON_RESUME=all")


@pytest.mark.parametrize("section", ["sft", pytest.param("ppo", marks=ALL)])
def test_a_cut_cable_ends_both_and_the_same_command_goes_on(section, micro_recipe, tmp_path, root):
    """Afterwards the result is the one of a run whose cable was never cut, bit for bit."""
    published = load_recipe(micro_recipe).run_dir

    def run(where: str) -> tuple[object, ...]:
        folder = tmp_path / where / "micro"
        if not folder.exists():
            for name in ("tokenizer", "pretrain", "sft", "reward"):
                if name != section:
                    shutil.copytree(published / name, folder / name)
        keys = [f"{section}.{key}" for key in (*KEYS[section], f"train.ddp_timeout={TIMEOUT}")]
        return ("cpu2", f"stages.{section}", micro_recipe, f"output_root={tmp_path / where}", *keys)

    with two_nodes(root) as nodes:
        codes, output = ended(nodes.launch(*run("whole")))
        assert codes == [0, 0], output
        stage = tmp_path / "cut" / "micro" / section
        launched = nodes.launch(*run("cut"))
        while not any((stage / "state").glob("step-*")):
            assert all(process.poll() is None for process in launched), ended(launched)
            time.sleep(0.01)
        nodes.cut()
        codes, output = ended(launched)
        assert 0 not in codes and not (stage / "stage.json").exists()
        for rank, said in enumerate(output):
            assert f"process {rank} of 2 on " in said and "waited for the other processes in " in said, said
            assert "The same command goes on from the last saved state" in said
        nodes.mend()
        codes, output = ended(nodes.launch(*run("cut")))
        assert codes == [0, 0], output
        assert "resum" in output[0]
    assert differences(stage, tmp_path / "whole" / "micro" / section) == []
