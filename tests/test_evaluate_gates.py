"""The gate of an evaluation: floors and paired differences, per task and model; what is not evaluated is refused."""

import json

import pytest

from baton.report.collect import read_run
from baton.runner import run_pipeline
from handoff.errors import GateError
from handoff.refused import failed_dir, read_refused
from handoff.stage import StageDir
from stages.evaluate.config import Config
from stages.evaluate.gates import judged, left_out
from tests.conftest import MICRO
from training.recipe import RecipeError, load_recipe
from training.run import run_section

DATA = [{"source": "world", "kind": "prompts", "size": 20, "split": "test"}]
TASKS = [
    {"name": "world", "data": DATA, "scores": [{"function": "exact_match", "name": "right", "on": "greedy"}]},
    {
        "name": "text",
        "kind": "documents",
        "data": [{"source": "world", "kind": "documents", "size": 4, "split": "test"}],
    },
    {"name": "free", "data": DATA},
]


def config(*conditions, models=("pretrain", "sft", "ppo")):
    return Config.model_validate({"models": list(models), "tasks": TASKS, "gate": {"tasks": list(conditions)}})


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 20}


def results(right, bits):
    """Those of `sft` and its child `ppo`, with the differences between them."""
    values = {"sft": estimate(0.5, 0.4, 0.6), "ppo": estimate(0.4, 0.3, 0.5)}
    return {
        "models": ["sft", "ppo"],
        "tasks": {
            "world": {
                "metrics": {model: {"right": one} for model, one in values.items()},
                "changes": {"ppo": {"over": "sft", "metrics": {"right": estimate(*right)}}},
            },
            "text": {
                "metrics": {model: {"bits_per_byte": estimate(1, 0.9, 1.1)} for model in values},
                "changes": {"ppo": {"over": "sft", "metrics": {"bits_per_byte": estimate(*bits)}}},
            },
            "free": {"metrics": {model: {} for model in values}, "changes": {}},
        },
    }


def verdicts(*conditions, right=(-0.1, -0.2, 0.01), bits=(0.1, -0.01, 0.2)):
    one = config(*conditions)
    return judged(one.gate, one.tasks, {"sft": "sft", "ppo": "ppo"}, results(right, bits))


def test_a_floor_is_for_one_model_or_for_all():
    one, other = verdicts({"task": "world", "min": 0.45})
    assert (one.model, one.passed, other.model, other.passed) == ("sft", True, "ppo", False)
    assert other.said == "world, ppo: right is 0.4 (0.3 to 0.5); the gate demands at least 0.45"
    (only,) = verdicts({"task": "world", "min": 0.4, "model": "ppo"})
    assert only.passed and only.value == 0.4
    (lost,) = verdicts({"task": "free", "metric": "stop_rate", "min": 0.5, "model": "sft"})
    assert not lost.passed and "stop_rate was not measured" in lost.said


@pytest.mark.parametrize(
    ("task", "interval", "passed"),
    [
        ("world", (-0.1, -0.2, 0.01), True),  # worse, but not beyond the interval
        ("world", (-0.1, -0.2, -0.01), False),
        ("world", (0.1, 0.01, 0.2), True),
        ("text", (0.1, -0.01, 0.2), True),
        ("text", (0.1, 0.01, 0.2), False),  # more bits a byte are worse
        ("text", (-0.1, -0.2, -0.01), True),
    ],
)
def test_no_worse_than_the_parent_means_beyond_the_paired_interval(task, interval, passed):
    (one,) = verdicts({"task": task, "no_worse_than": "parent"}, right=interval, bits=interval)
    assert (one.model, one.passed) == ("ppo", passed), "a first model is compared with nothing"
    assert "from that of sft; the gate demands no worse than sft, its parent" in one.said


def test_a_model_that_the_run_has_not_is_left_out_and_one_without_its_parent_fails():
    one = config({"task": "world", "min": 0.1, "model": "pretrain"})
    called = {"sft": "sft", "ppo": "ppo"}
    assert judged(one.gate, one.tasks, called, results((0, 0, 0), (0, 0, 0))) == []
    assert left_out(one.gate, list(called)) == ["pretrain"]
    (alone,) = verdicts({"task": "world", "no_worse_than": "parent", "model": "sft"})
    assert not alone.passed and "was not compared with its parent" in alone.said


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"task": "word", "min": 1}, "gate.tasks.0: word is not evaluated, did you mean world?"),
        ({"task": "world", "min": 1, "model": "judge"}, "judge is none of `models`; there are pretrain, sft, ppo"),
        ({"task": "world", "min": 1, "metric": "rigt"}, "world does not measure rigt, did you mean right?"),
        ({"task": "text", "min": 1, "metric": "accuracy"}, "text does not measure accuracy; there are bits_per_byte"),
        ({"task": "free", "min": 1}, "free has no `scores`; name a metric of stop_rate"),
        ({"task": "world"}, "give either `min`, `max` or both, or `no_worse_than`"),
        (
            {"task": "world", "min": 1, "no_worse_than": "parent"},
            "give either `min`, `max` or both, or `no_worse_than`",
        ),
        ({"task": "world", "min": 1, "max": 0}, "no value is at least 1 and at most 0"),
        ({"task": "free", "metric": "kl", "no_worse_than": "parent"}, "neither more nor less kl is worse"),
    ],
)
def test_a_gate_on_what_is_not_evaluated_is_refused(condition, said):
    with pytest.raises(ValueError) as refused:
        config(condition)
    assert said in str(refused.value)


def recipe_with(path, gate, models="pretrain, sft"):
    keys = f"models: [{models}], tasks: {json.dumps(TASKS)}, gate: {json.dumps(gate)}"
    section = f"  gated: {{stage: evaluate, {keys}}}\n"  # the run is other tests', too, which may publish `evaluate`
    path.write_text(path.read_text() + section)
    return load_recipe(path)


def test_a_parent_that_is_not_evaluated_is_refused_before_anything_starts(tmp_path):
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(root=tmp_path / "runs"))
    gate = {"tasks": [{"task": "world", "model": "sft", "no_worse_than": "parent"}]}
    recipe = recipe_with(path, gate, "sft")
    with pytest.raises(RecipeError, match=r"gated\.gate: sft is to be no worse than its parent pretrain, which is not"):
        run_pipeline(recipe, (), (), None, dry_run=True)
    assert not recipe.run_dir.exists()


@pytest.mark.slow
def test_an_evaluation_below_its_gate_is_kept_aside_and_the_report_shows_it(micro_recipe, tmp_path):
    path = tmp_path / "micro.yaml"
    path.write_text(micro_recipe.read_text())
    recipe = recipe_with(
        path, {"tasks": [{"task": "text", "max": 99.0}, {"task": "text", "model": "sft", "max": 0.01}]}
    )
    with pytest.raises(GateError, match=r"text, sft: bits_per_byte is .*; the gate demands at most 0.01"):
        run_section(recipe, "gated")
    kept = failed_dir(recipe.run_dir, "gated")
    gates = json.loads((kept / "results.json").read_text())["gates"]
    assert [(gate["task"], gate["model"], gate["passed"]) for gate in gates] == [
        ("text", "pretrain", True),
        ("text", "sft", True),
        ("text", "sft", False),
    ]
    assert (kept / "answers.arrow").is_file() and StageDir(recipe.run_dir / "gated").manifest() is None
    (stage,) = [one for one in read_run(recipe.run_dir).stages if one.name == "gated"]
    assert stage.results is not None and [gate.passed for gate in stage.results.gates] == [True, True, False]
    assert read_refused(recipe.run_dir, "gated").reasons == [gates[2]["said"]]
