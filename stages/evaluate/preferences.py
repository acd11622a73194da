"""Tasks of kind `preferences`: which of two answers a model, or a reward, prefers.

The implicit reward of a model is beta * log(p(answer) / p_parent(answer)), as DPO defines it (Rafailov et al. 2023,
arXiv:2305.18290, equation 5); beta scales both answers' rewards alike. Explicit rewards, which the recipe names under
`scores`, have rows of their own in the table. RewardBench's rows are pairs with a column `subset`: `group_by: subset`.
"""

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from data.errors import RowRefused
from data.records import Preference, Prompt
from data.rows import Rows
from reward.compose import Answers
from stages.evaluate import likelihood
from stages.evaluate.answers import Answer
from stages.evaluate.part import Scorers, Subject, TaskPart
from stages.evaluate.rows import Compared, group_keys
from stages.evaluate.statistics import Items
from stages.evaluate.tasks import PreferencesTask
from training.limits import within_window
from training.run import Run

Both = tuple[float, float]
"""Values of the chosen and the rejected answer."""
Encoded = tuple[list[int], list[int], list[int]]
"""Ids of the prompt, the chosen and the rejected answer."""


class PreferencesPart(TaskPart[PreferencesTask]):
    """One task of kind `preferences`."""

    needs_parent = True

    def __init__(
        self, run: Run, number: int, task: PreferencesTask, subjects: Sequence[Subject], scorers: Scorers
    ) -> None:
        super().__init__(run, number, task, subjects)
        self.entries = scorers.there(run, task.name, task.scores)
        for subject in subjects:
            subject.encoder.check_template()
        parents = [subject.parent for subject in subjects]
        longest = within_window(run, parents, f"tasks.{number}.max_length", task.max_length)
        rows: Rows[Preference] = run.rows(task.data, Compared(), label=None)
        encoded = {subject.name: [_encoded(subject.encoder, pair, longest) for pair in rows] for subject in subjects}
        dropped = {
            i: found.reason
            for found_of in encoded.values()
            for i, found in enumerate(found_of)
            if isinstance(found, RowRefused)
        }
        kept = rows.without(dropped, lambda pair: pair.origin)
        run.account(task.name, kept, 1.0)
        self.pairs = list(kept)
        self.encoded = {
            name: [found for i, found in enumerate(found_of) if i not in dropped and not isinstance(found, RowRefused)]
            for name, found_of in encoded.items()
        }
        self.column, self.keys = group_keys(
            f"{run.recipe.path}: {self.place}.group_by", task.group_by, [pair.columns for pair in self.pairs]
        )
        first = subjects[0]
        self.prompts = [
            EncodedPrompt(ids, Prompt(pair.prompt, pair.origin, pair.columns | {"reference": pair.chosen}))
            for pair, (ids, _, _) in zip(self.pairs, self.encoded[first.name], strict=True)
        ]
        self.scorer = scorers.scorer(run, self.entries, parents, self.prompts) if self.entries else None
        self.logp: dict[str, list[Both]] = {}
        self.implicit: dict[str, list[Both]] = {}
        self.explicit: dict[str, list[tuple[float | None, float | None]]] = {}
        self.steps = 2 * len(self.pairs)

    def _likelihoods(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> list[Both]:
        """log p of both answers of each pair. Each process reads its share, then all processes get all numbers."""
        engine, rows = self.run.engine, self.encoded[subject.name]
        mine = engine.share(len(rows))
        flat = [(rows[i][0], answer) for i in mine for answer in rows[i][1:]]
        values = iter(likelihood.of_pairs(model, subject.encoder, flat, self.batch_size, advance=advance))
        return engine.join([(i, (next(values), next(values))) for i in mine])

    def measure(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> None:
        """The likelihood of both answers."""
        self.logp[subject.name] = self._likelihoods(subject, model, advance)

    def against(self, subject: Subject, parent: PreTrainedModel) -> None:
        """The implicit rewards: with the parent's likelihoods of the same tokens."""
        before = self._likelihoods(subject, parent, lambda _: None)
        pairs = zip(self.logp[subject.name], before, strict=True)
        self.implicit[subject.name] = [(a - b, c - d) for (a, c), (b, d) in pairs]

    def finish(self, subject: Subject) -> None:
        """The explicit rewards, once: they do not depend on the model."""
        super().finish(subject)
        if self.scorer is None or self.explicit:
            return
        ids = self.encoded[self.subjects[0].name]
        both = [(i, text, ids[i][1 + k]) for i, pair in enumerate(self.pairs)
                for k, text in enumerate((pair.chosen, pair.rejected))]  # fmt: skip
        _, parts = self.scorer.together(
            Answers(
                prompts=[self.pairs[i].prompt for i, _, _ in both],
                prompt_ids=[ids[i][0] for i, _, _ in both],
                texts=[text for _, text, _ in both],
                ids=[answer for _, _, answer in both],
                stopped=[True] * len(both),
                columns=[self.prompts[i].record.columns for i, _, _ in both],
            )
        )
        for name, values in parts.items():
            self.explicit[name] = list(zip(values[::2], values[1::2], strict=True))

    def items(self) -> dict[str, dict[str, Items]]:
        """Whether each pair is put in order: by the implicit reward, the likelihood, and each explicit reward."""
        found: dict[str, dict[str, Items]] = {}
        for model, logp in self.logp.items():
            own = {"accuracy": ordered(self.implicit[model])} if model in self.implicit else {}
            found[model] = own | {"likelihood": ordered(logp)}
        return found | {name: {"accuracy": ordered(values)} for name, values in self.explicit.items()}

    def about(self) -> str:
        """How many pairs are put in order."""
        return f"{self.count} pairs of answers, of which one is better"

    def first_metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def answers(self) -> Iterator[Answer]:
        """What every model and reward prefers of every pair."""
        items = self.items()
        values: dict[str, Sequence[tuple[float | None, float | None]]] = {**self.logp, **self.explicit}
        for model, of_pairs in values.items():
            for i, pair in enumerate(self.pairs):
                scores = {name: one.values[i] for name, one in items[model].items()}
                first = next(iter(scores.values()))
                told = of_pairs[i]
                yield Answer(
                    task=self.task.name,
                    item=i,
                    model=model,
                    kind="pair",
                    origin=str(pair.origin),
                    group=self.keys[i],
                    prompt=pair.prompt,
                    answer={1.0: pair.chosen, 0.0: pair.rejected}.get(first) if first is not None else None,
                    reference=pair.chosen,
                    scores=scores,
                    options=(pair.chosen, pair.rejected),
                    log_likelihoods=[value for value in told if value is not None],
                )


def ordered(values: Sequence[tuple[float | None, float | None]]) -> Items:
    """1 where the chosen answer has more, 0 where the rejected one has, 1/2 where both have as much."""
    return Items(
        [None if good is None or bad is None else 0.5 if good == bad else float(good > bad) for good, bad in values]
    )


def _encoded(encoder: Encoder, pair: Preference, longest: int) -> Encoded | RowRefused:
    """A pair as a model reads it, or why it cannot."""
    prompt = encoder.prompts([pair.prompt])[0]
    answers = encoder.answers([pair.chosen, pair.rejected])
    for part in (prompt, *answers):
        if isinstance(part, RowRefused):
            return part
    assert isinstance(prompt, list) and isinstance(answers[0], list) and isinstance(answers[1], list)
    if len(prompt) + max(len(answers[0]), len(answers[1])) > longest:
        return RowRefused("longer than max_length", "raise max_length")
    return prompt, answers[0], answers[1]
