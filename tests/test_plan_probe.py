"""`baton plan --probe`: three steps of a section on its longest rows, without a trace in the run."""

from pathlib import Path

import pytest

from baton.plan import plan
from baton.probe import probed
from handoff.files import list_files
from tests.stage_chain import chain, runs
from training.trainer import StepOrder


def test_the_longest_rows_come_first_when_a_run_tries_them() -> None:
    lengths = [5, 9, 2, 7, 9, 1, 3, 8]
    order = StepOrder(8, 4, seed=0, lengths=lengths)
    order.longest_first()
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    without = StepOrder(8, 4, seed=0)
    before = list(without)
    without.longest_first()
    assert list(without) == before  # no lengths are known


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not measure peak memory")
def test_a_probe_corrects_the_plan_and_changes_nothing() -> None:
    recipe = chain()
    before = list_files(runs() / "tiny")
    found = plan(recipe, [f"output_root={runs()}"])
    only = [section for section in found.sections if section.name == "sft"]
    (section,) = probed(type(found)(found.recipe, found.request, found.device, only), None).sections
    assert section.measured is not None and section.measured > 0
    if section.settings.correction > 0.1:  # the smallest factor
        assert section.peak == pytest.approx(section.measured, rel=0.05)
    assert list_files(runs() / "tiny") == before
    assert not [path for path in runs().iterdir() if "probe" in path.name]
