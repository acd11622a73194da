"""Tasks of kind `choices`: the model's answer is the choice whose text is likeliest after the question.

The numbers are those of lm-evaluation-harness (Gao et al.): `accuracy` by the sum of the choice's log-probabilities,
and `accuracy_norm` by that sum divided by the choice's characters. Question and choice are plain text, without the chat
template.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from data.encode import Encoder
from data.records import Message, Question
from data.rows import Choices
from handoff.window import model_window
from stages.evaluate import likelihood, trees
from stages.evaluate.answers import Answer
from stages.evaluate.part import Subject, TaskPart
from stages.evaluate.rows import (
    LETTERS,
    Shot,
    continued,
    filled,
    first_of_each,
    group_keys,
    listed,
    shots_for,
    without_marks,
)
from stages.evaluate.statistics import Items
from stages.evaluate.tasks import ChoicesTask
from training.recipe import RecipeError
from training.run import Run


@dataclass(frozen=True)
class Asked:
    """A question as the model reads it."""

    before: str
    """What is read first."""
    options: tuple[str, ...]
    """What may follow, after a space."""
    right: int


class ChoicesPart(TaskPart[ChoicesTask]):
    """One task of kind `choices`."""

    def __init__(self, run: Run, number: int, task: ChoicesTask, subjects: Sequence[Subject]) -> None:
        super().__init__(run, number, task, subjects)
        shots: list[Shot] = []
        if task.few_shot is not None:
            rows, by = run.rows(task.few_shot.data, Choices(), label=f"{task.name}'s examples"), task.few_shot.by
            keys = [None if by is None else str(question.columns.get(by)) for question in rows]
            bare = task.model_copy(update={"intro": "", "few_shot": None})
            for place in first_of_each(task.few_shot.count, keys):
                one = asked(bare, (), rows[place])
                shots.append((keys[place], one.before, one.options[one.right]))
        self.questions = list(run.rows(task.data, Choices(), label=task.name))
        self.asked = [asked(task, shots, question) for question in self.questions]
        self.column, self.keys = group_keys(
            f"{run.recipe.path}: {self.place}.group_by", task.group_by, [one.columns for one in self.questions]
        )
        self.read = {subject.name: self._read(subject) for subject in subjects}
        self.sums: dict[str, list[list[float]]] = {}
        self.steps = sum(len(one.options) for one in self.asked)

    def _read(self, subject: Subject) -> list[list[likelihood.Pair]]:
        """What the model reads for each choice of each question.

        Raises:
            RecipeError: a question with one of its choices is longer than the model's window.
        """
        found = [encode(subject.encoder, one.before, one.options) for one in self.asked]
        window = model_window(subject.parent.weights_dir)
        for question, pairs in zip(self.questions, found, strict=True):
            length = likelihood.longest(pairs)
            if window is not None and length > window.tokens:
                raise RecipeError(
                    f"{self.run.recipe.path}: {self.place}: {question.origin} takes {length} tokens with a choice, and "
                    f"{subject.name} reads {window.tokens} ({window.key} in its config.json); leave the row out of "
                    f"{self.task.name}, or the model out of `models`"
                )
        return found

    def measure(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> None:
        """The likelihood of every choice. Each process reads its share, then all processes get all numbers."""
        engine, rows = self.run.engine, self.read[subject.name]
        mine = engine.share(len(rows))
        sums = trees.of_choices(model, subject.encoder, [rows[i] for i in mine], self.batch_size, advance)
        self.sums[subject.name] = engine.join(zip(mine, sums, strict=True))

    def items(self) -> dict[str, dict[str, Items]]:
        """Whether each question was answered rightly, by both ways to choose."""
        return {model: right(self.asked, sums) for model, sums in self.sums.items()}

    def about(self) -> str:
        """How many questions are asked."""
        return f"{self.count} questions; every model chooses the likeliest of the given answers"

    def first_metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def answers(self) -> Iterator[Answer]:
        """The choice of every model for every question."""
        for model, sums in self.sums.items():
            found = right(self.asked, sums)
            for i, (question, one) in enumerate(zip(self.questions, self.asked, strict=True)):
                choice = int(np.argmax(sums[i]))
                yield Answer(
                    task=self.task.name,
                    item=i,
                    model=model,
                    kind="choices",
                    origin=str(question.origin),
                    group=self.keys[i],
                    prompt=[Message("user", one.before)],
                    answer=question.choices[choice],
                    reference=question.choices[question.right],
                    scores={name: values.values[i] for name, values in found.items()},
                    options=question.choices,
                    log_likelihoods=sums[i],
                    choice=choice,
                    right=question.right,
                )


def asked(task: ChoicesTask, shots: Sequence[Shot], question: Question) -> Asked:
    """The question in the task's form, after the solved examples."""
    intro, text = (
        filled(form, question.text, question.columns, question.origin, choices=listed(question))
        for form in (task.intro, task.prompt)
    )
    options = question.choices if task.answer == "text" else tuple(LETTERS[: len(question.choices)])
    if task.clean == "wikihow":
        text, options = without_marks(text), tuple(map(without_marks, options))
    by = None if task.few_shot is None else task.few_shot.by
    return Asked(intro + continued(shots_for(shots, by, question.columns), text), options, question.right)


def encode(encoder: Encoder, before: str, options: Sequence[str]) -> list[likelihood.Pair]:
    """What is read first, and the choice, for each choice.

    The choice's tokens are those by which the whole text is longer than the prompt's own tokens: so does
    lm-evaluation-harness cut, and a tokenizer that joins characters across the border gives the same numbers.
    """
    # Spaces at the end of the prompt belong to the choice's first token.
    whole = encoder.documents([before.rstrip(), *(f"{before} {option}" for option in options)])
    context, *texts = [ids[:-1] for ids in whole]  # without the end token
    return [(text[: len(context)], text[len(context) :]) for text in texts]


def right(questions: Sequence[Asked], sums: Sequence[Sequence[float]]) -> dict[str, Items]:
    """1 or 0 for each question, by both ways to choose. `sums`: the log-likelihoods of each question's choices."""
    plain, normed = [], []
    for question, values in zip(questions, sums, strict=True):
        assert all(map(math.isfinite, values))
        lengths = [len(option) for option in question.options]
        plain.append(float(int(np.argmax(values)) == question.right))
        normed.append(float(int(np.argmax(np.asarray(values) / lengths)) == question.right))
    return {"accuracy": Items(plain), "accuracy_norm": Items(normed)}
