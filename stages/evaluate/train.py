"""Evaluation: every model of the run answers the same held-out prompts, greedily and sampled.

    python -m stages.evaluate recipes/tiny.yaml

The recipe's `scores` (verifiers, reward models, judges, functions) are measured on greedy or sampled answers or both.
Sampled answers use the same random numbers for every model, and the KL from the parent is measured on them. Held-out
documents, and the answers that the rows themselves have, give bits per byte. results.json, beside the manifest, holds
each metric with its 95 % interval, the first metric also by group, each model's difference from its parent, item by
item, and how often its answer is better than its parent's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from data.records import Question, Text
from data.rows import Choices, Prompts, Texts
from handoff.errors import HandoffError
from handoff.files import write_json
from handoff.parent import Parent
from handoff.window import model_window
from reward.compose import Answers
from reward.learned import LearnedReward
from rollout.engine import generate
from rollout.sampling import SamplingSpec
from stages.evaluate import choices, likelihood, tables
from stages.evaluate.config import Answering, Config, ScoreConfig
from stages.evaluate.statistics import Items
from stages.evaluate.tables import Answered
from training.limits import within_window
from training.model import Model, load_encoder
from training.recipe import RecipeError
from training.rewards import Scorer, load_rewards, readable, token_readers
from training.run import Run


def train(run: Run) -> None:
    """Runs the stage (it trains nothing; every stage's entry has this name)."""
    config: Config = run.config
    present = run.present_parents()
    parents = _models(run, present)
    entries = _entries(run, present)

    # The prompts are encoded for each model by its own encoder: a foreign model keeps its own template.
    encoders = {name: load_encoder(parent) for name, parent in parents.items()}
    for encoder in encoders.values():
        encoder.check_template()
    first = next(iter(encoders.values()))
    readers = [*parents.values(), *token_readers(entries, lambda ref: present[ref])]
    longest = within_window(run, readers, "max_prompt_length", config.max_prompt_length, config.max_new_tokens)
    context = within_window(run, parents.values(), "context_length", config.context_length)
    prompts = run.rows(config.data, Prompts(longest), first, "prompts")
    prompts = readable(run, entries, prompts, "prompts", max_drop_fraction=1.0)
    documents = run.rows(config.text, Texts(Text), label="documents") if config.text else ()
    texts = [text for part in documents for text in part]
    questions = {
        entry.name: list(run.rows(entry.data, Choices(), label=f"{entry.name}'s questions"))
        for entry in config.multiple_choice
    }
    # A prompt that one of the templates cannot express is an error before any model answers, and so is a question that
    # exceeds a window.
    encoded = {name: [encoder.prompt(p.record.messages) for p in prompts] for name, encoder in encoders.items()}
    read = {name: _choices_read(run, parents[name], encoder, questions) for name, encoder in encoders.items()}
    column, keys = _groups(run, prompts)
    scorers = _scorers(run, entries, present, list(parents.values()), prompts)

    answered: dict[str, Answered] = {}
    origins: dict[str, str] = {}
    each = len(prompts) * 2 + sum(len(question.choices) for rows in questions.values() for question in rows)
    with run.progress(len(parents) * each, "evaluate") as advance:
        for name, parent in parents.items():
            encoder = encoders[name]
            ids = encoded[name]
            model = Model.load(
                run.engine, parent, "policy", encoder, config.model_args, bf16=False, frozen=True
            ).freeze()
            with model.whole() as module:
                answered[name] = _answer(run, module, encoder, ids, advance)
                answered[name].beside = _choices(run, module, encoder, questions, read[name], advance)
                answered[name].beside |= _references(run, parent, module, encoder, prompts, ids)
                if texts:
                    answered[name].beside["bits_per_byte"] = _documents(run, module, encoder, texts, context)
            del model, module
            origin = parent.manifest.parents.get("parent") if parent.manifest is not None else None
            # Look the parent up by fingerprint: a model of another run may have a parent of the same name.
            before = None if origin is None else _same(origin.fingerprint, parents, answered)
            if before is not None:
                origins[name] = before
                other = parents[before]
                reference = Model.load(
                    run.engine, other, "reference", encoder, config.model_args, dtype=None, bf16=False, frozen=True
                ).freeze()
                with reference.whole() as module:
                    rows = [(prompt, c.ids) for prompt, c in zip(ids, answered[name].sampled, strict=True)]
                    logp = likelihood.of_pairs(
                        module, encoder, rows, config.batch_size, temperature=config.temperature, whole=False
                    )
                answered[name].kl = [sum(c.logprobs) - lp for c, lp in zip(answered[name].sampled, logp, strict=True)]
                del reference, module
            answered[name].scores = _scores(entries, scorers, prompts, ids, answered[name])
            for line in tables.unscored(name, answered[name]):
                run.console.print(f"  {line}")

    measured = [metric for entry in entries for metric in entry.metrics.values()]
    by_group = tables.groups(run.seed, measured[0], keys, answered) if measured else {}
    results = {
        "models": list(parents),
        "metrics": tables.metrics(run.seed, answered),
        "changes": tables.changes(run.seed, origins, answered),
        "families": by_group,
        "grouped": {"column": column, "metric": measured[0]} if by_group else None,
        "win_rates": tables.win_rates(run.seed, config.wins, origins, answered) if config.wins in measured else {},
        "samples": [
            {
                "prompt": "\n".join(m.content for m in prompts[i].record.messages),
                "reference": _reference(prompts[i]),
                "answers": {name: a.greedy_texts[i] for name, a in answered.items()},
            }
            for i in tables.spread(keys, config.samples)
        ],
    }
    if run.is_main:
        write_json(run.dir.path / "results.json", results)
    _print(run, results, len(prompts))
    metrics = {"models": len(parents), "prompts": len(prompts), **_headline(results)}
    run.publish("evaluation", None, metrics, files=["results.json"])


def _print(run: Run, results: dict[str, Any], prompts: int) -> None:
    """Prints the table of the metrics, that of the differences from the parents, and the win rates."""
    config: Config = run.config
    on = config.measured_on()
    run.console.print(
        f"  {prompts} held-out prompts, each answered twice by every model: greedy (the likeliest token at each place) "
        f"and sampled (at temperature {config.temperature:g}). In brackets: 95 % intervals"
    )
    for said, lines in ((None, tables.printed(results, on)), tables.printed_changes(results)):
        if said is not None:
            run.console.print(f"  {said}")
        if lines:
            table = Table(*lines[0], box=None, padding=(0, 2))
            for row in lines[1:]:
                table.add_row(*row)
            run.console.print(table)
    for model, win in results["win_rates"].items():
        run.console.print(
            f"  {model}: its {on[win['by']]} answer scores higher in {win['by']} than that of {win['over']} on "
            f"{win['value']:.0%} of the prompts ({win['low']:.0%} to {win['high']:.0%}); a tie counts half"
        )


def _same(fingerprint: str, parents: dict[str, Parent], answered: dict[str, Answered]) -> str | None:
    """The name of the model with that fingerprint, if it has already answered the prompts."""
    return next((name for name in answered if parents[name].fingerprint == fingerprint), None)


def _models(run: Run, present: dict[str, Parent]) -> dict[str, Parent]:
    """The published models to evaluate: {section, or for a model from outside the recipe its own name: model}."""
    config: Config = run.config
    parents: dict[str, Parent] = {}
    for ref in config.models:
        if ref not in present:
            run.console.print(f"  {ref}: not in this run, left out")
            continue
        parent = present[ref]
        parents[ref if ref in run.recipe.sections else parent.name] = parent
    if not parents:
        raise HandoffError(
            f"{run.recipe.run_dir}: none of {', '.join(config.models)} has been published; make one with `baton run`"
        )
    return parents


def _entries(run: Run, present: dict[str, Parent]) -> list[ScoreConfig]:
    """The entries of `scores` whose reward models have been published; the others are reported and left out."""
    config: Config = run.config
    entries = []
    for entry in config.scores:
        missing = [ref for ref in entry.references if ref not in present]
        if missing:
            run.console.print(
                f"  score {entry.name}: left out, {', '.join(missing)} is not in this run"
                + ("; wins are left out with it" if config.wins in entry.metrics.values() else ""),
            )
        else:
            entries.append(entry)
    return entries


def _groups(run: Run, prompts: Sequence[EncodedPrompt]) -> tuple[str, list[str | None]]:
    """(column, each prompt's group: the column's value as text, or None if the prompt lacks the column)."""
    config: Config = run.config
    column = config.group_by or "family"
    values = [p.record.columns.get(column) for p in prompts]
    keys = [None if value is None else str(value) for value in values]
    if config.group_by is not None and not any(keys):
        there = sorted({name for p in prompts for name in p.record.columns})
        raise RecipeError(
            f"{run.section.name}.group_by: no prompt has the column {column}; there are {', '.join(there) or 'none'}"
        )
    return column, keys


def _scorers(
    run: Run,
    entries: Sequence[ScoreConfig],
    present: dict[str, Parent],
    policies: Sequence[Parent],
    prompts: Sequence[EncodedPrompt],
) -> dict[Answering, Scorer]:
    """The scorer of each kind of answers. A faulty entry raises its error here, before any prompt is answered."""
    config: Config = run.config
    learned: dict[str, LearnedReward] = {}
    frozen: list[Model] = []
    kinds: tuple[Answering, ...] = ("greedy", "sampled")
    return {
        kind: Scorer(
            load_rewards(
                run.engine,
                chosen,
                present.__getitem__,
                policies,
                prompts,
                config.model_args,
                bf16=False,
                learned=learned,
                frozen=frozen,
            ),
            run.engine,
            frozen,
        )
        for kind in kinds
        if (chosen := [entry for entry in entries if kind in entry.metrics])
    }


def _scores(
    entries: Sequence[ScoreConfig],
    scorers: dict[Answering, Scorer],
    prompts: Sequence[EncodedPrompt],
    ids: Sequence[list[int]],
    answered: Answered,
) -> dict[str, list[float | None]]:
    """{metric: values (N,)} in the order of the recipe."""
    found: dict[str, list[float | None]] = {}
    answers = {"greedy": (answered.greedy, answered.greedy_texts), "sampled": (answered.sampled, answered.texts)}
    for kind, scorer in scorers.items():
        completions, texts = answers[kind]
        _, parts = scorer.together(
            Answers(
                prompts=[p.record.messages for p in prompts],
                prompt_ids=ids,
                texts=texts,
                ids=[c.ids for c in completions],
                stopped=[c.end == "stop" for c in completions],
                columns=[p.record.columns for p in prompts],
            )
        )
        found |= {entry.metrics[kind]: parts[entry.name] for entry in entries if kind in entry.metrics}
    return {metric: found[metric] for entry in entries for metric in entry.metrics.values()}


def _answer(
    run: Run, model: PreTrainedModel, encoder: Encoder, ids: Sequence[list[int]], advance: Callable[[int], None]
) -> Answered:
    """Greedy and sampled answers. Each process generates its share, then all processes get all answers."""
    config: Config = run.config
    mine = run.engine.share(len(ids))
    both = []
    for temperature in (0.0, config.temperature):
        spec = SamplingSpec.of(encoder, config.max_new_tokens, temperature=temperature)
        keys = [("evaluate", i) for i in mine]
        completions = generate(model, [ids[i] for i in mine], spec, keys, run.seed, config.batch_size, advance)
        both.append(run.engine.join(zip(mine, completions, strict=True)))
    greedy, sampled = both
    return Answered(greedy, [encoder.decode(c.ids) for c in greedy], sampled, [encoder.decode(c.ids) for c in sampled])


def _choices_read(
    run: Run, parent: Parent, encoder: Encoder, questions: Mapping[str, Sequence[Question]]
) -> dict[str, list[list[likelihood.Pair]]]:
    """What the model reads for each choice of each question.

    Raises:
        RecipeError: a question with one of its choices is longer than the model's window.
    """
    config: Config = run.config
    found = {
        entry.name: [choices.encode(encoder, entry.prompt, question) for question in questions[entry.name]]
        for entry in config.multiple_choice
    }
    window = model_window(parent.weights_dir)
    for entry in config.multiple_choice:
        for question, pairs in zip(questions[entry.name], found[entry.name], strict=True):
            length = likelihood.longest(pairs)
            if window is not None and length > window.tokens:
                raise RecipeError(
                    f"{run.recipe.path}: {run.section.name}.multiple_choice: {question.origin} takes {length} tokens "
                    f"with a choice, and {parent.name} reads {window.tokens} ({window.key} in its config.json); leave "
                    f"the row out of {entry.name}, or the model out of `models`"
                )
    return found


def _choices(
    run: Run,
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Mapping[str, Sequence[Question]],
    read: Mapping[str, Sequence[Sequence[likelihood.Pair]]],
    advance: Callable[[int], None],
) -> dict[str, Items]:
    """Whether each question was answered rightly, by both ways to choose. Each process reads its share, then all
    processes get all numbers."""
    config: Config = run.config
    found: dict[str, Items] = {}
    for name, rows in questions.items():
        mine = run.engine.share(len(rows))
        pairs = [read[name][i] for i in mine]
        flat = [pair for row in pairs for pair in row]
        values = iter(likelihood.of_pairs(model, encoder, flat, config.batch_size, advance=advance))
        sums = run.engine.join([(i, [next(values) for _ in row]) for i, row in zip(mine, pairs, strict=True)])
        found |= choices.right(name, rows, sums)
    return found


def _references(
    run: Run,
    parent: Parent,
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[EncodedPrompt],
    ids: Sequence[list[int]],
) -> dict[str, Items]:
    """Bits of the answers in the rows, with their stop tokens, and bytes of their texts; nothing if no row has one.

    An answer that does not fit the model's window, or its template, has no value.
    """
    config: Config = run.config
    window = model_window(parent.weights_dir)
    told = likelihood.references(encoder, prompts, ids)
    fitting = [i for i, pair in told.items() if window is None or likelihood.longest([pair]) <= window.tokens]
    if not fitting:
        return {}
    mine = run.engine.share(len(fitting))
    nats = likelihood.of_pairs(model, encoder, [told[fitting[i]] for i in mine], config.batch_size)
    found = dict(zip(fitting, run.engine.join(zip(mine, nats, strict=True)), strict=True))
    values = [-found[i] * likelihood.BITS if i in found else None for i in range(len(prompts))]
    sizes = [len(str(p.record.columns.get("reference", "")).encode()) for p in prompts]
    return {"reference_bits_per_byte": Items(values, sizes)}


def _documents(run: Run, model: PreTrainedModel, encoder: Encoder, texts: Sequence[str], context: int) -> Items:
    """Bits and bytes of each document. Each process reads its share, then all processes get all numbers."""
    config: Config = run.config
    mine = run.engine.share(len(texts))
    nats = likelihood.of_documents(model, encoder, [texts[i] for i in mine], context, config.batch_size)
    bits = [-value * likelihood.BITS for value in run.engine.join(zip(mine, nats, strict=True))]
    return Items(bits, [len(text.encode()) for text in texts])


def _reference(prompt: EncodedPrompt) -> str | None:
    """The right answer to show beside the models' answers: the column `answer`, else `reference` (data.load)."""
    columns = prompt.record.columns
    found = columns.get("answer", columns.get("reference"))
    return None if found is None else str(found)


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """The last model's metrics, for the table of stages."""
    last = results["models"][-1]
    out = {f"{last}/{metric}": estimate["value"] for metric, estimate in results["metrics"][last].items()}
    if last in results["win_rates"]:
        out[f"{last}/win_rate"] = results["win_rates"][last]["value"]
    return out
