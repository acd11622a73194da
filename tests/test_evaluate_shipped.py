"""Shipped tasks read rows as they are published, ask them in the task's form, and score right answers as right."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.accounting import Accounting
from data.errors import DataError
from data.load import read
from data.records import Preference, Prompt, Question, Text
from reward.compose import Answers, Composition
from reward.functions import RewardError
from reward.verifiers.extract import regex_extract
from stages.evaluate.choices import asked
from stages.evaluate.config import Config
from stages.evaluate.rows import Asked, group_keys
from stages.evaluate.shipped import SHIPPED
from stages.evaluate.tasks import AnswersTask, ChoicesTask

FIVE = ["one", "two", "three", "four"]
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"},
    "svamp": {"ID": "a", "Body": "He has 2", "Question": "How many?", "Answer": 2.0, "Type": "x"},
    "math": {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
    "mmlu": {"question": " Which? ", "subject": "high_school_biology", "choices": FIVE, "answer": 2},
    "arc_easy": {"question": "Which?", "choices": {"text": FIVE, "label": list("ABCD")}, "answerKey": "C"},
    "arc_challenge": {"question": "Which?", "choices": {"text": FIVE, "label": list("ABCD")}, "answerKey": "C"},
    "hellaswag": {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man cooks. [header] Soup [title] Boil it.",
                  "ctx_b": "he then", "ctx": "A man cooks. he then", "endings": ["stirs [step] it.", "sleeps."],
                  "label": "0"},
    "ifeval": {"key": 1, "prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "humaneval": {"task_id": "a/0", "prompt": 'def two() -> int:\n    """Two."""\n', "entry_point": "two",
                  "canonical_solution": "    return 2\n", "test": "def check(c):\n    assert c() == 2\n"},
    "mbpp": {"task_id": 1, "text": "Write two().", "code": "def two():\n    return 2", "test_setup_code": "",
             "test_list": ["assert two() == 2", "assert two() < 3"], "challenge_test_list": []},
    "rewardbench": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "subset": "chat", "id": 3},
    "preferences": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
    "bits_per_byte": {"text": "A text."},
}  # fmt: skip
RIGHT = {
    "gsm8k": ("So 2 + 2 = 4.\n#### 4", "So 2 + 2 = 5.\n#### 5"),
    "svamp": ("He has 2 cups.", "3"),
    "math": ("It is \\boxed{0.5}.", "\\boxed{2}"),
    "ifeval": ("Hi there", "Hi, there"),
    "humaneval": ("```python\ndef two() -> int:\n    return 2\n```", "```python\ndef two():\n    return 3\n```"),
    "mbpp": ("```python\ndef two():\n    return 2\n```", "```python\ndef two():\n    return 1\n```"),
}
WANT = {"answers": Prompt, "choices": Question, "preferences": Preference, "documents": Text}


def config(shipped: str, path: Path, **keys: Any) -> Any:
    task = {"task": shipped, "data": [{"source": "file", "path": str(path)}], **keys}
    return Config.model_validate({"models": ["sft"], "tasks": [task]}).tasks[0]


def record(name: str, folder: Path, **changed: Any) -> Any:
    """(the task, its one row as it is read)."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name] | changed) + "\n")
    task = config(name, path)
    (found,) = read(task.data, WANT[task.kind], None, 0, Accounting())
    return task, found


@pytest.mark.parametrize("name", SHIPPED)
def test_published_rows_are_read_and_have_the_group(name, tmp_path, root):
    task, found = record(name, tmp_path)
    assert task.name == name and task.kind == SHIPPED[name].kind
    if task.kind != "documents" and task.group_by is not None:
        _, (group,) = group_keys("here", task.group_by, [found.columns])
        assert group
    assert f"`{name}`" in (root / "docs" / "tasks.md").read_text(), "the page names every task"


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_score_one_and_wrong_ones_nothing(name, tmp_path):
    task, found = record(name, tmp_path)
    assert isinstance(task, AnswersTask)
    form = Asked(9, task.form == "text", task.prompt, task.system, task.intro)._asked(found)
    assert isinstance(form, Prompt)
    scores = Composition(task.scores, {})
    scores.check_columns(set(form.columns))
    texts = list(RIGHT[name])
    both = scores(Answers([form.messages] * 2, [[1]] * 2, texts, [[1]] * 2, [True] * 2, [form.columns] * 2))
    assert both.parts == {entry.name: [1.0, 0.0] for entry in task.scores}


def test_choices_are_asked_as_the_harness_asks_them(tmp_path):
    forms = {}
    for name in ("mmlu", "arc_easy", "hellaswag"):
        task, found = record(name, tmp_path)
        assert isinstance(task, ChoicesTask)
        one = asked(task, (), found)
        forms[name] = (one.before, one.options)
    assert forms["mmlu"] == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:", tuple("ABCD"),
    )  # fmt: skip
    assert forms["arc_easy"] == ("Question: Which?\nAnswer:", tuple(FIVE))
    assert forms["hellaswag"] == ("Cooking: A man cooks. Soup. Boil it. He then", ("stirs it.", "sleeps."))


def test_a_recipes_keys_come_before_the_shipped_ones_and_a_wrong_name_is_said(tmp_path):
    task = config("gsm8k", tmp_path, name="maths", form="chat", max_new_tokens=9)
    assert (task.name, task.form, task.max_new_tokens, task.prompt) == (
        "maths",
        "chat",
        9,
        "Question: {question}\nAnswer:",
    )
    for keys, message in (
        ({"task": "gsm8"}, "no shipped task gsm8, did you mean gsm8k"),
        ({"task": "zzzz"}, "there are gsm8k, svamp"),
        ({"task": "mmlu", "kind": "answers"}, "the shipped task mmlu is of kind choices"),
    ):
        with pytest.raises(ValueError, match=message):
            config("mmlu", tmp_path, **keys)


def test_a_file_without_the_tasks_column_is_named_with_its_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Half?", "solution": "x"}) + "\n")
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: no column `problem` to be read as `prompt`; the row has question"
    ):
        list(read(config("math", path).data, Prompt, None, 0, Accounting()))


def test_a_regular_expression_that_is_none_is_refused():
    for args, message in (
        ({"pattern": "("}, "is not a regular expression"),
        ({"pattern": "a", "take": "x"}, "neither"),
    ):
        with pytest.raises(RewardError, match=message):
            regex_extract([], ["a"], answer=["a"], **args)
    golds: list[Any] = ["1,200", None]
    assert regex_extract([], ["#### 1200", "#### 1"], pattern="[0-9]+", ignore=[","], answer=golds) == [1.0, None]
