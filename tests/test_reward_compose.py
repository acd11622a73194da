"""Composition: rewards are summed by weight; a reward that fails or returns an invalid value is a named error."""

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.records import Message
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.functions import RewardError
from training.recipe import RecipeError, load_recipe


def answers() -> Answers:
    texts = ["Of course! 42", "41", "no idea at all no idea at all"]
    ids = [[1] * 40, [1] * 3, [1] * 8]
    return Answers(
        prompts=[(Message("user", "6 * 7?"),)] * 3,
        prompt_ids=[[5]] * 3,
        texts=texts,
        ids=ids,
        stopped=[True, True, False],
        columns=[{"answer": "Of course! 42"}, {"answer": "42"}, {}],
    )


@pytest.fixture
def function(monkeypatch, tmp_path):
    """Writes a reward function of the user and returns its entry: `function("return [1.0] * 3", "limit=3")`."""

    def write(body: str, parameters: str = "**columns", **entry: object) -> RewardConfig:
        lines = f"def mine(prompts, completions, {parameters}):\n    {body}\n"
        (tmp_path / "my_rewards.py").write_text(lines)
        sys.modules.pop("my_rewards", None)
        return RewardConfig(function="my_rewards:mine", **entry)

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("my_rewards", None)


def scores(entry: RewardConfig):
    return Composition([entry], {})(answers())


def error(entry: RewardConfig) -> str:
    """The error message of a call."""
    with pytest.raises(RewardError) as raised:
        scores(entry)
    return str(raised.value)


def test_composition_weights_rewards_keeps_parts_and_counts_none_as_zero():
    entries = [
        RewardConfig(function="exact_match", weight=2.0),
        RewardConfig(function="length_penalty", weight=0.5, args={"free": 20}),
    ]
    found = Composition(entries, {})(answers())
    assert found.parts == {"exact_match": [1.0, 0.0, None], "length_penalty": [-1.0, 0.0, 0.0]}
    assert found.total == [1.5, 0.0, 0.0]
    assert {name: values.count(None) for name, values in found.parts.items()} == {"exact_match": 1, "length_penalty": 0}
    assert (found.dense, found.disagreement, found.members) == (None, None, {})


def test_one_function_twice_under_two_names():
    entries = [
        RewardConfig(function="length_penalty", name="gentle", args={"free": 20}),
        RewardConfig(function="length_penalty", name="hard", args={"free": 2}),
    ]
    assert Composition(entries, {})(answers()).parts == {"gentle": [-1.0, 0.0, 0.0], "hard": [-19.0, -0.5, -3.0]}


def test_a_function_receives_what_its_signature_names(function):
    everything = "return [float(len(columns))] * len(prompts)"
    assert scores(function(everything)).total == [3.0] * 3  # the column, completion_ids, stopped
    assert scores(function("return [float(len(i)) for i in completion_ids]", "*, completion_ids")).total == [40, 3, 8]
    assert scores(function("return [float(a is None) for a in answer]", "answer")).total == [0, 0, 1]
    # Given in the recipe and in the data, the recipe's value counts.
    assert scores(function("return [float(answer)] * 3", "answer", args={"answer": 7})).total == [7, 7, 7]


def test_a_column_that_this_batch_lacks_is_none_everywhere(function):
    """In a mixture, other batches have the column."""
    entry = function("return [0.0 if x is None else 1.0 for x in solution]", "solution")
    Composition([entry], {}).check_columns({"answer", "solution"})
    assert scores(entry).total == [0, 0, 0]


def test_numbers_of_other_kinds_are_numbers(function):
    found = scores(function("import numpy; return (True, numpy.float32(0.5), numpy.int64(2))"))
    assert found.total == [1.0, 0.5, 2.0] and all(type(value) is float for value in found.parts["mine"])


# ---- errors


def test_a_function_that_raises_is_named_with_row_and_place(function):
    said = error(function("return [1 / (len(c) - 2) for c in completions]"))
    path = str(Path(sys.path[0]) / "my_rewards.py")
    assert said == f"reward `mine` raised ZeroDivisionError: division by zero ({path}:2, on row 1, the answer '41')"


def test_a_function_that_raises_on_the_batch_only(function):
    said = error(function("assert len(prompts) < 2, 'one at a time'; return [0.0]"))
    assert said.startswith("reward `mine` raised AssertionError: one at a time (") and said.endswith("my_rewards.py:2)")


def test_a_functions_own_reward_error_is_kept(function):
    body = "from reward.functions import RewardError; raise RewardError('row 3: no key for the judge; set one')"
    assert error(function(body)) == "reward `mine`: row 3: no key for the judge; set one"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "reward `mine` returned 1 values for 3 answers"),
        ("return None", "reward `mine` returned a value of type NoneType; it must return a list"),
        ("return 'abc'", "reward `mine` returned 'abc'; it must return a list"),
        ("import torch; return torch.zeros(3)", "reward `mine` returned a value of type Tensor; it must return"),
        (
            "return [1.0, '0.5', 1.0]",
            "reward `mine` returned '0.5' for row 1, the answer '41'; return a number or None",
        ),
        (
            "return [1.0, 1.0, [2.0]]",
            "reward `mine` returned a value of type list for row 2, the answer 'no idea at all",
        ),
        (
            "return [float('nan')] * 3",
            "reward `mine` returned nan for row 0, the answer 'Of course! 42'; return a finite number or None",
        ),
        ("return [0.0, 0.0, float('-inf')]", "reward `mine` returned -inf for row 2, the answer 'no idea at all"),
    ],
)
def test_invalid_return_values_are_named(function, body, said):
    assert error(function(body)).startswith(said)


def test_a_long_answer_is_cut_in_a_message(function):
    long = [*answers().texts[:2], "x" * 1000]
    entry = function("return [0.0, 0.0, 'bad']")
    with pytest.raises(RewardError) as raised:
        Composition([entry], {})(Answers(**{**vars(answers()), "texts": long}))
    assert len(str(raised.value)) < 200 and "x…'" in str(raised.value)


def test_unknown_arguments_of_a_function_are_refused(function):
    made = "reward `length_penalty`: `length_penalty` has no argument `fre`; did you mean `free`?"
    with pytest.raises(RewardError) as raised:
        Composition([RewardConfig(function="length_penalty", args={"fre": 3})], {})
    assert str(raised.value) == made
    for key in ("completion_ids", "prompts", "columns", "stopped"):
        with pytest.raises(RewardError, match=f"has no argument `{key}`; it has free"):
            Composition([RewardConfig(function="length_penalty", args={key: 3})], {})
    with pytest.raises(RewardError, match="has no argument `x`; it has none"):
        Composition([function("return [0.0] * 3", args={"x": 1})], {})


def test_an_invalid_function_is_refused():
    with pytest.raises(RewardError, match=r"`reward\.functions:FUNCTIONS` is not callable"):
        Composition([RewardConfig(function="reward.functions:FUNCTIONS")], {})


def test_an_optional_column_that_only_other_batches_have_is_given_as_none(function):
    compose = Composition([function("return [float(columns['ground_truth'] == [None] * 3)] * 3")], {})
    compose.check_columns({"answer", "ground_truth"})
    assert compose(answers()).total == [1, 1, 1]


def test_a_missing_column_is_found_before_training(function):
    composition = Composition([RewardConfig(function="length_penalty"), RewardConfig(function="exact_match")], {})
    composition.check_columns({"answer", "family"})
    with pytest.raises(RewardError) as raised:
        composition.check_columns({"solution", "family"})
    assert str(raised.value) == (
        "reward `exact_match` needs the column `answer` in the prompts' data; it has family, solution. Add it to the "
        "data, or set it in the reward's `args`"
    )
    with pytest.raises(RewardError, match="`answer` in the prompts' data; it has none"):
        composition.check_columns(set())
    Composition([function("return [0.0] * 3", "answer", args={"answer": "7"})], {}).check_columns(set())


# ---- the entry


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "a reward needs exactly one of"),
        ({"model": "a", "function": "b"}, "a reward needs exactly one of"),
        ({"model": "a", "models": ["b", "c"]}, "a reward needs exactly one of"),
        ({"model": "a", "args": {"n": 1}}, "`args` apply to functions only"),
        ({"models": ["a", "b"], "args": {}}, "`args` apply to functions only"),
        ({"function": "f", "reencode": True}, "`reencode` applies to reward models only"),
        ({"function": "f", "read": "last"}, "`read` applies to reward models only"),
        ({"models": ["a"]}, "at least 2"),
        ({"models": ["a", "b", "a"]}, "names one model twice"),
        ({"model": "a", "combine": "min"}, "`combine` is for ensembles"),
        ({"models": ["a", "b"], "std_coef": 2.0}, "`std_coef` is not read unless combine is mean_minus_std"),
        ({"models": ["a", "b"], "combine": "mean_minus_std", "std_coef": -1.0}, "greater than or equal to 0"),
        ({"model": "a", "read": "every", "reencode": True}, "`read: every` rewards the policy's own tokens"),
        ({"model": "a", "name": ""}, "at least 1 character"),
    ],
)
def test_contradictory_keys_are_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        RewardConfig(**keys)


def test_names_and_references():
    entries = [
        RewardConfig(model="reward"),
        RewardConfig(model="runs/other/reward", name="theirs"),
        RewardConfig(models=["reward_a", "runs/other/reward_b"]),
        RewardConfig(function="package.module:shout"),
    ]
    assert [entry.name for entry in entries] == ["reward", "theirs", "reward_a+reward_b", "shout"]
    assert [entry.references for entry in entries] == [
        ["reward"], ["runs/other/reward"], ["reward_a", "runs/other/reward_b"], [],
    ]  # fmt: skip


def test_a_recipe_says_where_an_entry_is_wrong(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nstages:\n  ppo:\n    parent: org/sft\n    data: [{source: world, kind: prompts}]\n    reward:\n"
        "      - {models: [org/a, org/b], combine: worst}\n      - {model: org/a, read: every, reencode: true}\n"
        "      - {model: 3}\n"
    )
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{path}:7: ppo.reward.0.combine: 'worst' is none of mean, min, mean_minus_std"
    assert lines[1].startswith(
        f"{path}:8: ppo.reward.1: `read: every` rewards the policy's own tokens, but `reencode` "
    )
    assert lines[2:] == [f"{path}:9: ppo.reward.2.model: expected text, not 3"]
