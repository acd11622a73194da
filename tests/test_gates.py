"""Gates: a result below its gate is kept aside and not published, and what was published before is current again."""

import json
import math

import pytest

from baton.report.alerts import warnings
from baton.report.collect import read_run
from baton.status import State, overview
from handoff.errors import GateError
from handoff.files import read_json
from handoff.parent import open_parent
from handoff.refused import Verdict, failed_dir, read_refused
from handoff.stage import StageDir
from handoff.verify import verify_run
from stages.ppo.config import Config as PPO
from stages.ppo.guards import Look
from stages.ppo.metrics import PUBLISHED
from tests.conftest import MICRO
from tests.handoff_models import inputs, publish, write_model
from training.gates import Bound, Gate, check_measured, judged
from training.recipe import RecipeError, load_recipe
from training.run import main

LOW = [Verdict(metric="eval_loss", passed=False, said="eval_loss is 3; the gate demands at most 2", value=3.0)]


def attempt(stage, given, value, verdicts=(), **more):
    """One start of a stage; `value` is that of its weights."""
    stage.begin(given)
    try:
        return publish(stage, lambda path: write_model(path, value=value), given=given, judge=lambda: verdicts, **more)
    finally:
        stage.close()


def test_what_was_published_before_is_current_again_and_nothing_is_lost(tmp_path):
    stage = StageDir(tmp_path / "sft")
    first = attempt(stage, inputs(beta=1), 1.0)
    stage.begin(inputs(beta=2))
    (stage.path / "rows.jsonl").write_text("of the second")
    stage.close()
    with pytest.raises(
        GateError, match=r"is not published:\n  - eval_loss is 3; the gate demands at most 2\nIt is kept"
    ):
        attempt(stage, inputs(beta=2), 2.0, LOW)
    assert open_parent("sft", tmp_path, {"causal_lm"}).fingerprint == first.fingerprint
    assert verify_run(tmp_path) == []

    failed = read_refused(tmp_path, "sft")
    assert failed.reasons == [LOW[0].said] and failed.manifest.inputs == inputs(beta=2)
    assert (failed.path / "model" / "model.safetensors").is_file()
    (failed.path / "model" / "config.json").write_text("{}")
    assert [(p.stage, p.file) for p in verify_run(tmp_path)] == [(".failed/sft", "model/config.json")]

    # The next start goes on with what the refused one made, and a result that passes takes its place.
    assert stage.begin(inputs(beta=2)) and (stage.path / "rows.jsonl").read_text() == "of the second"
    stage.close()
    second = attempt(stage, inputs(beta=2), 2.0)
    assert stage.manifest().fingerprint == second.fingerprint != first.fingerprint
    assert not (tmp_path / ".failed").exists()


def test_a_stricter_gate_leaves_what_an_earlier_one_let_pass(tmp_path):
    stage = StageDir(tmp_path / "evaluate")
    lax, strict = (inputs().model_copy(update={"demands": {"gate": {"min": value}}}) for value in (0.5, 0.9))
    for given, verdicts in ((lax, ()), (strict, LOW)):
        stage.begin(given)
        stage.made("results.json").write_text(json.dumps({"gate": given.demands}))
        rest = {"kind": "evaluation", "files": ["results.json"], "given": given, "judge": lambda v=verdicts: v}
        if verdicts:
            with pytest.raises(GateError):
                publish(stage, None, **rest)
        else:
            publish(stage, None, **rest)
        stage.close()
    assert stage.manifest().inputs == lax and verify_run(tmp_path) == []
    assert read_json(stage.path / "results.json") == {"gate": lax.demands}
    assert read_json(failed_dir(tmp_path, "evaluate") / "results.json") == {"gate": strict.demands}


def test_bounds_hold_at_their_ends_and_never_for_what_is_no_number():
    bound = Bound(min=0.5, max=2)
    assert [bound.holds(value) for value in (0.5, 2.0, 0.49, 2.01, math.nan, math.inf)] == [True, True] + [False] * 4
    gate = Gate(metrics={"eval_loss": Bound(max=2), "lost": Bound(min=0)})
    loss, lost = judged(gate, {"eval_loss": 1.5})
    assert (loss.passed, loss.value, loss.said) == (True, 1.5, "eval_loss is 1.5; the gate demands at most 2")
    assert not lost.passed and lost.said == "lost was not measured; the gate demands at least 0"
    (diverged,) = judged(Gate(metrics={"eval_loss": Bound(max=2)}), {"eval_loss": math.inf})
    assert not diverged.passed and diverged.value is None


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("pretrain.gate.metrics.eval_los.max=2", "the section publishes no metric eval_los, did you mean eval_loss?"),
        ("sft.gate.metrics.accuracy.min=2", "the section publishes no metric accuracy; it publishes eval_"),
        ("sft.gate.metrics={eval_loss: {}}", "demands nothing: give `min`, `max` or both"),
        ("sft.gate.metrics={eval_loss: {min: 2, max: 1}}", "no value is at least 2 and at most 1"),
        ("sft.gate.min=2", "sft.gate.min: unknown key"),
        ("dpo.gate.metrics.eval_loss.max=2", "eval_loss is measured on held-out rows: name them under eval_data"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused(tmp_path, key, said):
    path = tmp_path / "micro.yaml"
    dpo = "  dpo: {parent: sft, data: [{source: world, kind: preferences, size: 4}]}\n"
    path.write_text(MICRO.format(root=tmp_path).rstrip() + "\n" + dpo)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path, [key])
    assert said in str(refused.value)


def test_what_reinforcement_learning_publishes_can_be_gated():
    names = {*PUBLISHED, *Look(1, 0, 0, 0, 0, 0).metrics(), "kept_iteration", "weights/changed"}
    check_measured(Gate(metrics={name: Bound(min=0) for name in names}), PPO.published, held_out=True)


def test_a_stage_below_its_gate_ends_with_3_and_status_and_report_say_why(tmp_path, capsys):
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(root=tmp_path / "runs"))

    def run(least):
        key = f"tokenizer.gate.metrics.train_bytes_per_token.min={least}"
        with pytest.raises(SystemExit) as ended:
            main("tokenizer", [str(path), key])
            raise SystemExit(0)
        return load_recipe(path, [key]), ended.value.code

    recipe, code = run(50)
    said = capsys.readouterr().err
    assert code == 3 and "tokenizer: the result is below its gate and is not published" in said
    assert "the gate demands at least 50" in said and "Traceback" not in said
    found = overview(recipe)["tokenizer"]
    assert found.state is State.UNFINISHED and "its last result was below its gate: train_bytes_per_token is" in str(
        found
    )
    (warning,) = [one for one in warnings(read_run(recipe.run_dir)) if "did not pass its gate" in one]
    assert "train_bytes_per_token is" in warning and "nothing of it is published" in warning

    recipe, code = run(1)
    assert code == 0 and overview(recipe)["tokenizer"].state is State.UP_TO_DATE
    assert not any("gate" in one for one in warnings(read_run(recipe.run_dir)))
