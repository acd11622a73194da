"""Tasks of the evaluation: several answers, plain text with examples, pairs; each against a plain computation."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.encode import Encoder
from data.errors import DataError, RowRefused
from data.records import Message, Origin, Preference, Prompt
from stages.evaluate.answers import Answer, read, schema, write
from stages.evaluate.preferences import ordered
from stages.evaluate.rows import Asked, filled
from stages.evaluate.several import VOTES, majority_at, pass_at
from stages.evaluate.tasks import AnswersTask
from training.recipe import load_recipe
from training.run import run_section

DATA = [{"source": "world", "kind": "prompts", "size": 4}]


def evaluated(micro_recipe: Path, folder: Path, tasks: list[dict[str, Any]], models: str = "pretrain, sft") -> Any:
    """The recipe of an evaluation with these tasks, after it ran."""
    path = folder / "micro.yaml"
    path.write_text(micro_recipe.read_text() + f"  evaluate: {{models: [{models}], tasks: {json.dumps(tasks)}}}\n")
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    return recipe


def results_of(recipe: Any, task: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
    return found["tasks"][task]


def test_pass_at_k_is_the_mean_over_all_choices_of_k_answers():
    """Chen et al. 2021, figure 3, is the closed form of this enumeration."""
    scores = [1.0, 0.0, 0.0, 1.0, 0.0, 0.5]
    for k in range(1, 7):
        picks = [any(score >= 1 for score in pick) for pick in itertools.combinations(scores, k)]
        assert pass_at(k, scores) == pytest.approx(np.mean(picks))
    assert pass_at(3, [1.0, None, 0.0]) is None and pass_at(2, [1.0, None, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("vote", "texts", "scores", "k", "expected"),
    [
        ("number", ["It is 7.", "#### 7.0", "8"], [1.0, 1.0, 0.0], 3, 1.0),
        ("number", ["8 cups", "#### 1,000", "so 8"], [0.0, 1.0, 0.0], 3, 0.0),
        ("number", ["7", "8"], [1.0, 0.0], 2, 0.5),
        ("number", ["no idea", "none"], [0.0, 0.5], 2, 0.25),
        ("choice", ["The answer is (B).", "A.", "B"], [1.0, 0.0, 1.0], 3, 1.0),
        ("text", ["a ", "a", "b", "b"], [1.0, 1.0, 0.0, 0.0], 2, 1.0),
        ("formula", [r"\boxed{\frac{1}{2}}", r"so $\frac{1}{2}$", "3"], [1.0, 1.0, 0.0], 3, 1.0),
    ],
)
def test_the_most_frequent_final_answer_counts(vote, texts, scores, k, expected):
    assert majority_at(k, texts, scores, VOTES[vote]) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scores": [{"function": "exact_match", "pass_at": [4]}]}, "needs 4 answers to a prompt: raise `num_gen"),
        ({"scores": [{"function": "exact_match", "pass_at": [1], "on": "greedy"}]}, "`pass_at` is for sampled answers"),
        ({"scores": [{"function": "exact_match"}], "num_generations": 0}, "scores sampled answers, and `num_generat"),
        ({"scores": [{"function": "exact_match", "on": "greedy"}], "greedy": False}, "and `greedy` is false"),
        ({"num_generations": 0, "temperature": 0.5}, "`temperature` is not read without sampled answers"),
        ({"vote": "number"}, "`vote` is not read without `majority_at`"),
        ({"form": "text", "system": "Be brief."}, "`system` is for `form: chat`"),
        ({"prompt": "Say it."}, "write {question} where the row's question goes"),
        ({"prompt": "{question} {reference}"}, "would show the models the right answer"),
    ],
)
def test_keys_that_a_task_would_not_read_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        AnswersTask.model_validate({"name": "t", "kind": "answers", "data": DATA, **keys})


def test_a_prompt_is_filled_from_the_rows_columns():
    origin = Origin("rows.jsonl", 3)
    columns = {"topic": "birds", "tests": ["assert a", "assert b"], "empty": None}
    assert filled("{topic}: {question} {{topic}}\n{tests}", "Why?", columns, origin) == (
        "birds: Why? {topic}\nassert a\nassert b"
    )
    with pytest.raises(DataError, match=r"rows.jsonl:3: .* reads the column `empty`, .* there are topic, tests"):
        filled("{empty}", "Why?", columns, origin)


def test_the_answers_of_a_crash_are_not_left_half_written(tmp_path):
    def broken():
        yield Answer("t", 0, "m", "greedy", answer="half a \ud800 pair", scores={"x": None})
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(tmp_path / "answers.arrow", broken())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "answers.arrow", itertools.islice(broken(), 1))
    table = read(tmp_path)
    assert table.schema == schema()
    (row,) = table.to_pylist()
    assert row["answer"] == "half a ? pair" and row["scores"] == [("x", None)] and row["stopped"] is None


@pytest.mark.slow
def test_several_answers_to_a_prompt(micro_recipe, tmp_path):
    score = {"function": "length_penalty", "name": "short", "args": {"free": 6}, "on": "both"}
    task = {"name": "one", "data": [{"source": "world", "kind": "prompts", "size": 6}], "max_new_tokens": 8}
    many = task | {"name": "many", "num_generations": 3, "scores": [score | {"pass_at": [1], "majority_at": [3]}]}
    recipe = evaluated(micro_recipe, tmp_path, [task | {"scores": [score]}, many])
    one, found = results_of(recipe, "one"), results_of(recipe, "many")
    rows = [row for row in read(recipe.run_dir / "evaluate").to_pylist() if row["model"] == "sft"]
    texts = {(row["task"], row["item"], row["kind"], row["sample"]): row["answer"] for row in rows}
    for item in range(6):
        assert texts["one", item, "sample", 0] == texts["many", item, "sample", 0], "the first answer is the same one"
    assert len({texts["many", item, "sample", k] for item in range(6) for k in range(3)}) > 6
    sampled = [dict(row["scores"])["short_sampled"] for row in rows if (row["task"], row["kind"]) == ("many", "sample")]
    assert found["metrics"]["sft"]["short_sampled"]["value"] == pytest.approx(np.mean(sampled)) and len(sampled) == 18
    assert found["metrics"]["sft"]["short_sampled"]["n"] == 6, "prompts are what the interval is over"
    assert found["metrics"]["sft"]["short_greedy"] == one["metrics"]["sft"]["short_greedy"]
    assert {"short_pass@1", "short_majority@3"} <= set(found["metrics"]["sft"])


@pytest.mark.slow
def test_plain_text_after_examples_is_continued_until_a_stop(micro_recipe, tmp_path):
    rows = [{"question": f"Ann has {n} cups?", "answer": f"So {n}.\n#### {n}", "topic": f"t{n}"} for n in range(6)]
    for name, some in (("shots", rows[:3]), ("rows", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    task = {
        "name": "plain", "form": "text", "prompt": "{topic} Q: {question}\nA:", "max_new_tokens": 12, "stop": ["e"],
        "few_shot": {"data": [{"source": "file", "path": f"{tmp_path}/shots.jsonl"}], "count": 2},
        "data": [{"source": "file", "path": f"{tmp_path}/rows.jsonl"}],
    }  # fmt: skip
    recipe = evaluated(micro_recipe, tmp_path, [task], "pretrain")
    folder = recipe.run_dir / "pretrain" / "model"
    model, encoder = AutoModelForCausalLM.from_pretrained(folder).eval(), Encoder.from_pretrained(folder)
    before = "".join(f"t{n} Q: Ann has {n} cups?\nA: So {n}.\n#### {n}\n\n" for n in range(2))
    greedy = [row for row in read(recipe.run_dir / "evaluate").to_pylist() if row["kind"] == "greedy"]
    assert len(greedy) == 3
    for n, row in enumerate(greedy, 3):
        asked = f"{before}t{n} Q: Ann has {n} cups?\nA:"
        assert [m["content"] for m in row["prompt"]] == [asked] and row["reference"] == str(n)
        ids = torch.tensor([encoder.tokenizer(asked, add_special_tokens=False).input_ids])
        with torch.no_grad():
            made = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=encoder.stop_ids)[0]
        said = encoder.tokenizer.decode(made[ids.shape[1] :], skip_special_tokens=True)
        assert row["answer"] == said.split("e")[0]
        assert row["stopped"] == ("e" in said or made[-1].item() in encoder.stop_ids)


def test_several_turns_are_no_plain_text():
    form = Asked(64, plain=True, prompt="Q: {question}")
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))
    assert isinstance(form._asked(Prompt(turns, Origin("x", 1))), RowRefused)
    chat = Asked(64, system="Be brief.", shots=((None, "1 + 1?", "2"),))._asked(Prompt(turns, Origin("x", 1)))
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "user", "assistant", "user"]


def test_pairs_of_equal_rewards_count_half():
    assert ordered([(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (None, 1.0)]).values == [1.0, 0.0, 0.5, None]


@pytest.mark.slow
def test_pairs_are_put_in_order_by_implicit_and_explicit_rewards(micro_recipe, tmp_path):
    rows = [
        {"prompt": f"Say {n}", "chosen": f"{n} cups", "rejected": f"{n}" * (n + 1), "subset": ["easy", "hard"][n % 2]}
        for n in range(1, 9)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "pairs", "kind": "preferences", "data": [{"source": "file", "path": f"{tmp_path}/pairs.jsonl"}],
        "group_by": "subset", "scores": [{"model": "reward"}, {"function": "length_penalty", "args": {"free": 1}}],
        "max_length": 40,
    }  # fmt: skip
    recipe = evaluated(micro_recipe, tmp_path, [task])
    found = results_of(recipe, "pairs")
    logp: dict[str, list[list[float]]] = {}
    for name in ("pretrain", "sft"):
        folder = recipe.run_dir / name / "model"
        model, encoder = AutoModelForCausalLM.from_pretrained(folder).eval(), Encoder.from_pretrained(folder)
        for row in rows:
            sums = []
            for answer in (row["chosen"], row["rejected"]):
                before = encoder.prompt((Message("user", row["prompt"]),))
                ids = before + encoder.answer(answer)
                with torch.no_grad():
                    each = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
                sums.append(sum(each[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
            logp.setdefault(name, []).append(sums)
    likelihood = np.mean([good > bad for good, bad in logp["sft"]])
    gains = [np.subtract(after, before) for after, before in zip(logp["sft"], logp["pretrain"], strict=True)]
    assert found["metrics"]["sft"]["likelihood"]["value"] == likelihood
    assert found["metrics"]["sft"]["accuracy"]["value"] == np.mean([good > bad for good, bad in gains])
    assert "accuracy" not in found["metrics"]["pretrain"], "its parent is not evaluated"
    assert found["models"] == ["pretrain", "sft", "reward", "length_penalty"]
    lengths = [[len(encoder.answer(row[key])) for key in ("chosen", "rejected")] for row in rows]
    shorter = np.mean([0.5 if good == bad else good < bad for good, bad in lengths])
    assert found["metrics"]["length_penalty"]["accuracy"]["value"] == shorter
    assert found["metrics"]["reward"]["accuracy"]["n"] == 8
    assert {group: one["sft"]["n"] for group, one in found["families"].items()} == {"hard": 4, "easy": 4}
    kept = [row for row in read(recipe.run_dir / "evaluate").to_pylist() if row["model"] == "sft"]
    assert [row["log_likelihoods"] for row in kept] == [pytest.approx(pair, rel=1e-4) for pair in logp["sft"]]
    assert [row["options"] for row in kept] == [[row["chosen"], row["rejected"]] for row in rows]


def test_other_columns_of_a_pair_do_not_decide_which_rows_a_mixture_uses():
    pairs = [Preference((Message("user", "a"),), "x", "y", Origin("f", 1), columns) for columns in ({}, {"subset": 1})]
    assert repr(pairs[0]) == repr(pairs[1])
