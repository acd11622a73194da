"""Evaluation: every model of the run is measured on the same tasks.

    python -m stages.evaluate recipes/tiny.yaml

A task is one of four kinds (stages/evaluate/tasks.py): answers that are generated and scored, choices, documents, and
preferences. Beside the manifest, results.json holds for each task every metric with its 95 % interval, the first metric
also by group, each model's difference from its parent, item by item, and how often its answer is better than its
parent's; answers.arrow holds every single answer (stages/evaluate/answers.py).
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from rich.table import Table

from handoff.errors import HandoffError
from handoff.files import write_json
from handoff.parent import Parent
from stages.evaluate import answers, gates, tables
from stages.evaluate.choices import ChoicesPart
from stages.evaluate.config import Config
from stages.evaluate.documents import DocumentsPart
from stages.evaluate.generation import AnswersPart
from stages.evaluate.harness import HarnessPart
from stages.evaluate.part import Part, Scorers, Subject
from stages.evaluate.preferences import PreferencesPart
from stages.evaluate.tasks import AnswersTask, ChoicesTask, DocumentsTask, TaskConfig
from training.model import Model, Role, load_encoder
from training.precision import answering_dtype
from training.run import Run


def train(run: Run) -> None:
    """Runs the stage (it trains nothing; every stage's entry has this name)."""
    config: Config = run.config
    present = run.present_parents()
    subjects = [Subject(name, parent, load_encoder(parent)) for name, parent in _models(run, present).items()]
    scorers = Scorers(present)
    parts = [_part(run, number, task, subjects, scorers) for number, task in enumerate(config.tasks)]
    parts += [HarnessPart(run, name, subjects) for name in config.lm_eval]

    origins: dict[str, str] = {}
    with run.progress(len(subjects) * sum(part.steps for part in parts), "evaluate") as advance:
        for place, subject in enumerate(subjects):
            model = _loaded(run, subject.parent, "policy", subject)
            with model.whole() as module:
                for part in parts:
                    part.measure(subject, module, advance)
            del model, module
            before = _origin(subject, subjects[:place])
            if before is not None:
                origins[subject.name] = before.name
                _against(run, [part for part in parts if part.needs_parent], subject, before)
            for part in parts:
                part.finish(subject)

    tasks = {part.name: part.results(origins) for part in parts}
    names = [subject.name for subject in subjects]
    called = {ref: ref if ref in run.recipe.sections else present[ref].name for ref in config.models if ref in present}
    for missing in gates.left_out(config.gate, list(called)):
        run.console.print(f"  the gate's conditions on {missing} are left out: it is not in this run")
    results: dict[str, Any] = {"models": names, "comparisons": tables.comparisons(tasks), "tasks": tasks}
    verdicts = gates.judged(config.gate, config.tasks, called, results)
    results["gates"] = [verdict.model_dump(exclude_none=True) for verdict in verdicts]
    if run.is_main:
        write_json(run.dir.made("results.json"), results)
    run.engine.on_main(partial(_write_answers, run, parts))
    _print(run, results)
    metrics = {"models": len(names), "items": sum(part.count for part in parts), **_headline(results)}
    run.publish("evaluation", None, metrics, files=["results.json", answers.FILE], verdicts=verdicts)


def _part(run: Run, number: int, task: TaskConfig, subjects: Sequence[Subject], scorers: Scorers) -> Part:
    """The task, prepared."""
    if isinstance(task, AnswersTask):
        return AnswersPart(run, number, task, subjects, scorers)
    if isinstance(task, ChoicesTask):
        return ChoicesPart(run, number, task, subjects)
    if isinstance(task, DocumentsTask):
        return DocumentsPart(run, number, task, subjects)
    return PreferencesPart(run, number, task, subjects, scorers)


def _against(run: Run, parts: Sequence[Part], subject: Subject, before: Subject) -> None:
    """Compares a model with its parent, in the tasks that do so by the parent's likelihoods."""
    if not parts:
        return
    reference = _loaded(run, before.parent, "reference", subject)
    with reference.whole() as module:
        for part in parts:
            part.against(subject, module)


def _loaded(run: Run, parent: Parent, role: Role, subject: Subject) -> Model:
    """A model that reads the ids of a subject's encoder."""
    keys: dict[str, Any] = {"dtype": answering_dtype(run.engine), "bf16": False, "frozen": True}
    return Model.load(run.engine, parent, role, subject.encoder, run.config.model_args, **keys).freeze()


def _origin(subject: Subject, earlier: Sequence[Subject]) -> Subject | None:
    """The model's parent, if it was measured before. It is looked up by fingerprint: a model of another run may have a
    parent of the same name."""
    manifest = subject.parent.manifest
    origin = None if manifest is None else manifest.parents.get("parent")
    if origin is None:
        return None
    return next((one for one in earlier if one.parent.fingerprint == origin.fingerprint), None)


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


def _write_answers(run: Run, parts: Sequence[Part]) -> None:
    answers.write(run.dir.made(answers.FILE), chain.from_iterable(part.answers() for part in parts))


def _print(run: Run, results: dict[str, Any]) -> None:
    """Prints each task's table of the metrics and that of the differences from the parents, and its win rates."""
    for name, task in results["tasks"].items():
        run.console.print(f"  {name}: {task['about']}. In brackets: 95 % intervals")
        _table(run, tables.printed(task))
        _table(run, tables.printed_changes(task))
        for model, win in task["win_rates"].items():
            run.console.print(
                f"  {model}: its {task['on'][win['by']]} answer scores higher in {win['by']} than that of "
                f"{win['over']} on {win['value']:.0%} of the prompts ({win['low']:.0%} to {win['high']:.0%}); a tie "
                "counts half"
            )
    count = results["comparisons"]
    if count:
        run.console.print(
            f"  Differences from the parent are item by item, with 95 % intervals; * leaves 0 out. Of {count} such "
            f"intervals, about {count * 0.05:.1f} leave out the true value by chance"
        )


def _table(run: Run, lines: Sequence[Sequence[str]]) -> None:
    if lines:
        table = Table(*lines[0], box=None, padding=(0, 2))
        for row in lines[1:]:
            table.add_row(*row)
        run.console.print(table)


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """The last model's metrics, for the table of stages: `<model>/<task>/<metric>`."""
    last = results["models"][-1]
    out: dict[str, float] = {}
    for name, task in results["tasks"].items():
        found = {metric: estimate["value"] for metric, estimate in task["metrics"][last].items()}
        if last in task["win_rates"]:
            found["win_rate"] = task["win_rates"][last]["value"]
        out |= {f"{last}/{name}/{metric}": value for metric, value in found.items()}
    return out
