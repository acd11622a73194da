"""Tasks of kind `answers`: every model answers the same prompts, greedily and sampled, and its answers are scored.

All models sample with the same random numbers, keyed by the prompt's and the answer's place in the task. KL from the
parent is measured on the sampled answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from data.errors import DataError, RowRefused
from data.records import Prompt
from data.rows import Rows
from handoff.window import model_window
from reward.compose import Answers
from rollout.engine import generate
from rollout.sampling import Completion, SamplingSpec
from stages.evaluate import likelihood, tables
from stages.evaluate.answers import Answer
from stages.evaluate.part import Scorers, Subject, TaskPart
from stages.evaluate.rows import Asked, Shot, filled, first_of_each, group_keys
from stages.evaluate.several import VOTES, majority_at, mean_of, pass_at
from stages.evaluate.statistics import Items
from stages.evaluate.tasks import Answering, AnswersTask, ScoreConfig
from training.limits import within_window
from training.rewards import readable, token_readers
from training.run import Run


@dataclass
class Answered:
    """One model's answers to all prompts, in the prompts' order, and their scores."""

    greedy: list[Completion] = field(default_factory=list)
    greedy_texts: list[str] = field(default_factory=list)
    sampled: list[list[Completion]] = field(default_factory=list)
    """For each prompt its sampled answers."""
    texts: list[list[str]] = field(default_factory=list)
    scores: dict[str, list[list[float | None]]] = field(default_factory=dict)
    """{metric: for each prompt the scores of its answers}."""
    kl: list[float] | None = None
    """KL from the model's parent, nats per answer; None if the parent was not evaluated."""
    references: Items | None = None
    """Bits and bytes of the rows' own answers."""


class AnswersPart(TaskPart[AnswersTask]):
    """One task of kind `answers`."""

    needs_parent = True

    def __init__(self, run: Run, number: int, task: AnswersTask, subjects: Sequence[Subject], scorers: Scorers) -> None:
        super().__init__(run, number, task, subjects)
        self.entries = scorers.there(run, task.name, task.scores)
        plain = task.form == "text"
        if not plain:
            for subject in subjects:
                subject.encoder.check_template()
        parents = [subject.parent for subject in subjects]
        readers = [*parents, *token_readers(self.entries, lambda ref: scorers.present[ref])]
        place = f"tasks.{number}.max_prompt_length"
        longest = within_window(run, readers, place, task.max_prompt_length, task.max_new_tokens)
        first = subjects[0].encoder
        by = None if task.few_shot is None else task.few_shot.by
        self.form = Asked(longest, plain, task.prompt, task.system, task.intro, _shots(run, task, first), by)
        rows = run.rows(task.data, self.form, first, task.name)
        self.prompts: Rows[EncodedPrompt] = readable(run, self.entries, rows, task.name, max_drop_fraction=1.0)
        # A prompt that one of the templates cannot express is an error before any model answers.
        self.records = [p.record for p in self.prompts]
        self.ids = {subject.name: _ids(self.form, subject.encoder, self.records) for subject in subjects}
        self.column, self.keys = group_keys(
            f"{run.recipe.path}: {self.place}.group_by", task.group_by, [record.columns for record in self.records]
        )
        self.vote = VOTES[task.vote]
        kinds: tuple[Answering, ...] = ("greedy", "sampled")
        self.scorers = {
            kind: scorers.scorer(run, chosen, parents, self.prompts)
            for kind in kinds
            if (chosen := [entry for entry in self.entries if kind in entry.metrics])
        }
        self.answered: dict[str, Answered] = {}
        self.steps = len(self.prompts) * (int(task.greedy) + task.num_generations)

    def measure(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> None:
        """Greedy and sampled answers. Each process generates its share, then all processes get all answers."""
        task, found = self.task, Answered()
        if task.greedy:
            answers = self._generate(subject, model, 0.0, 1, advance)
            found.greedy = [completions[0] for completions in answers]
        if task.num_generations:
            found.sampled = self._generate(subject, model, task.temperature, task.num_generations, advance)
        decode = self._decoder(subject.encoder)
        found.greedy = [_cut(one, decode, task.stop) for one in found.greedy]
        found.sampled = [[_cut(one, decode, task.stop) for one in group] for group in found.sampled]
        found.greedy_texts = [_text(decode(one.ids), task.stop) for one in found.greedy]
        found.texts = [[_text(decode(one.ids), task.stop) for one in group] for group in found.sampled]
        found.references = self._references(subject, model)
        self.answered[subject.name] = found

    def _generate(
        self, subject: Subject, model: PreTrainedModel, temperature: float, count: int, advance: Callable[[int], None]
    ) -> list[list[Completion]]:
        ids, mine = self.ids[subject.name], self.run.engine.share(len(self.prompts))
        cut = {"top_k": self.task.top_k, "top_p": self.task.top_p} if temperature > 0 else {}
        spec = SamplingSpec.of(subject.encoder, self.task.max_new_tokens, temperature=temperature, **cut)
        # The first answer's key has no number, so that it is the same one whatever the number of answers.
        keys: list[tuple[int | str, ...]] = [("evaluate", i, *([k] if k else [])) for i in mine for k in range(count)]
        prompts = [ids[i] for i in mine for _ in range(count)]
        done = generate(model, prompts, spec, keys, self.run.seed, self.batch_size, advance)
        groups = [done[place * count : (place + 1) * count] for place in range(len(mine))]
        return self.run.engine.join(zip(mine, groups, strict=True))

    def _decoder(self, encoder: Encoder) -> Callable[[Sequence[int]], str]:
        if not self.form.plain:
            return encoder.decode
        return lambda ids: str(encoder.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _references(self, subject: Subject, model: PreTrainedModel) -> Items | None:
        """Bits of the answers in the rows, with their stop tokens, and bytes of their texts; None if no row has one.

        An answer that does not fit the model's window, or its template, has no value.
        """
        if self.form.plain:
            return None
        window = model_window(subject.parent.weights_dir)
        told = likelihood.references(subject.encoder, self.prompts, self.ids[subject.name])
        fitting = [i for i, pair in told.items() if window is None or likelihood.longest([pair]) <= window.tokens]
        if not fitting:
            return None
        engine = self.run.engine
        mine = engine.share(len(fitting))
        nats = likelihood.of_pairs(model, subject.encoder, [told[fitting[i]] for i in mine], self.batch_size)
        found = dict(zip(fitting, engine.join(zip(mine, nats, strict=True)), strict=True))
        values = [-found[i] * likelihood.BITS if i in found else None for i in range(len(self.prompts))]
        sizes = [len(str(p.record.columns.get("reference", "")).encode()) for p in self.prompts]
        return Items(values, sizes)

    def against(self, subject: Subject, parent: PreTrainedModel) -> None:
        """KL of the sampled answers from the parent."""
        found = self.answered[subject.name]
        if not found.sampled:
            return
        task, ids = self.task, self.ids[subject.name]
        rows = [(ids[i], one.ids) for i, group in enumerate(found.sampled) for one in group]
        logp = iter(
            likelihood.of_pairs(
                parent, subject.encoder, rows, self.batch_size, temperature=task.temperature, whole=False
            )
        )
        kl = [[sum(one.logprobs) - next(logp) for one in group] for group in found.sampled]
        found.kl = [sum(values) / len(values) for values in kl]

    def finish(self, subject: Subject) -> None:
        """Scores the answers."""
        found = self.answered[subject.name]
        ids = self.ids[subject.name]
        for kind, scorer in self.scorers.items():
            if kind == "greedy":
                groups, texts = [[one] for one in found.greedy], [[text] for text in found.greedy_texts]
            else:
                groups, texts = found.sampled, found.texts
            flat = [(i, one, text) for i, group in enumerate(groups) for one, text in zip(group, texts[i], strict=True)]
            _, parts = scorer.together(
                Answers(
                    prompts=[self.records[i].messages for i, _, _ in flat],
                    prompt_ids=[ids[i] for i, _, _ in flat],
                    texts=[text for _, _, text in flat],
                    ids=[one.ids for _, one, _ in flat],
                    stopped=[one.end == "stop" for _, one, _ in flat],
                    columns=[self.records[i].columns for i, _, _ in flat],
                )
            )
            for entry in self.entries:
                if kind in entry.metrics:
                    values = iter(parts[entry.name])
                    found.scores[entry.metrics[kind]] = [[next(values) for _ in group] for group in groups]
        super().finish(subject)

    def items(self) -> dict[str, dict[str, Items]]:
        """Every metric of every model, item by item."""
        return {model: self._items(found) for model, found in self.answered.items()}

    def _items(self, found: Answered) -> dict[str, Items]:
        ended = [[one] for one in found.greedy] or found.sampled
        measured = found.sampled or [[one] for one in found.greedy]
        out = {
            "stop_rate": Items([mean_of([float(one.end == "stop") for one in group]) for group in ended]),
            "length_tokens": Items([mean_of([float(len(one.ids)) for one in group]) for group in measured]),
        }
        for entry in self.entries:
            out |= {name: Items([mean_of(row) for row in found.scores[name]]) for name in entry.metrics.values()}
            out |= {name: self._over(found, entry, which, k) for name, (which, k) in entry.of_groups.items()}
        if found.references is not None:
            out["reference_bits_per_byte"] = found.references
        return out if found.kl is None else out | {"kl": Items(found.kl)}

    def _over(self, found: Answered, entry: ScoreConfig, which: str, k: int) -> Items:
        """A metric over the sampled answers to each prompt."""
        scores = found.scores[entry.metrics["sampled"]]
        if which == "pass":
            return Items([pass_at(k, row) for row in scores])
        return Items([majority_at(k, texts, row, self.vote) for texts, row in zip(found.texts, scores, strict=True)])

    def about(self) -> str:
        """How many prompts are answered, and how."""
        task = self.task
        ways = ["greedy (the likeliest token at each place)"] if task.greedy else []
        if task.num_generations:
            times = "" if task.num_generations == 1 else f"{task.num_generations} times "
            ways.append(f"{times}sampled (at temperature {task.temperature:g})")
        return f"{self.count} held-out prompts, each answered by every model: {' and '.join(ways)}"

    def first_metric(self) -> str | None:
        """The first metric of `scores`."""
        return next((metric for entry in self.entries for metric in entry.metrics.values()), None)

    def more(self, origins: Mapping[str, str]) -> dict[str, Any]:
        """Win rates, and answers side by side."""
        wins = self.task.wins
        there = {metric for entry in self.entries for metric in entry.metrics.values()}
        won = tables.win_rates(self.run.seed, wins, origins, self.items()) if wins in there else {}
        shown = tables.spread(self.keys, self.run.config.samples)
        return {
            "win_rates": won,
            "samples": [
                {
                    "prompt": "\n".join(message.content for message in self.records[i].messages),
                    "reference": _reference(self.records[i]),
                    "answers": {
                        model: found.greedy_texts[i] if found.greedy else found.texts[i][0]
                        for model, found in self.answered.items()
                    },
                }
                for i in shown
            ],
        }

    def answers(self) -> Iterator[Answer]:
        """Every answer with its scores."""
        for model, found in self.answered.items():
            for i, prompt in enumerate(self.records):
                rows = [("greedy", 0, found.greedy[i], found.greedy_texts[i])] if found.greedy else []
                if found.sampled:
                    texts = zip(found.sampled[i], found.texts[i], strict=True)
                    rows += [("sample", k, one, text) for k, (one, text) in enumerate(texts)]
                for kind, k, one, text in rows:
                    answering: Answering = "greedy" if kind == "greedy" else "sampled"
                    names = [entry.metrics[answering] for entry in self.entries if answering in entry.metrics]
                    yield Answer(
                        task=self.task.name,
                        item=i,
                        model=model,
                        kind=kind,
                        sample=k,
                        origin=str(prompt.origin),
                        group=self.keys[i],
                        prompt=prompt.messages,
                        answer=text,
                        reference=_reference(prompt),
                        scores={name: found.scores[name][i][k] for name in names},
                        stopped=one.end == "stop",
                        tokens=len(one.ids),
                        log_likelihoods=[sum(one.logprobs)],
                    )


def _shots(run: Run, task: AnswersTask, encoder: Encoder) -> tuple[Shot, ...]:
    """The solved examples: the first rows of `few_shot`, in the task's form."""
    if task.few_shot is None:
        return ()
    rows = run.rows(task.few_shot.data, Asked(task.max_prompt_length, plain=True), encoder, f"{task.name}'s examples")
    records, by = [row.record for row in rows], task.few_shot.by
    keys = [None if by is None else str(record.columns.get(by)) for record in records]
    shots = []
    for place in first_of_each(task.few_shot.count, keys):
        record = records[place]
        answer = record.columns.get("reference")
        if not isinstance(answer, str):
            raise DataError(f"{record.origin}: an example of `few_shot` has no answer; give rows with answers")
        asked = filled(task.prompt, record.messages[-1].content, record.columns, record.origin)
        shots.append((keys[place], asked, answer))
    return tuple(shots)


def _ids(form: Asked, encoder: Encoder, records: Sequence[Prompt]) -> list[list[int]]:
    found = []
    for ids in form.ids(records, encoder):
        if isinstance(ids, RowRefused):
            raise ids
        found.append(ids)
    return found


def _cut(one: Completion, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> Completion:
    """The completion up to the token that completes one of the texts at which answers end."""
    if not any(stop in decode(one.ids) for stop in stops):
        return one
    low, high = 1, len(one.ids)  # the fewest tokens with such a text are in (low - 1, high]
    while low < high:
        middle = (low + high) // 2
        said = decode(one.ids[:middle])
        low, high = (low, middle) if any(stop in said for stop in stops) else (middle + 1, high)
    return Completion(one.ids[:low], one.logprobs[:low], "stop")


def _text(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _reference(prompt: Prompt) -> str | None:
    """The right answer to show beside the models' answers: the column `answer`, else `reference` (data.load)."""
    found = prompt.columns.get("answer", prompt.columns.get("reference"))
    return None if found is None else str(found)
