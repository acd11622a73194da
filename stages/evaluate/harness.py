"""Tasks that lm-evaluation-harness (Gao et al.) runs by itself on each model: `lm_eval: [arc_easy]`.

The values are the harness's own, and their intervals come from its standard errors. It also returns every item, so
differences from the parent are paired as everywhere. With `lm_eval_path` nothing is fetched: a task's YAML file names
local files (`dataset_path: json`, `dataset_kwargs: {data_files: ...}`).
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Real
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from data.records import Message
from stages.evaluate.answers import Answer
from stages.evaluate.part import Part, Subject
from stages.evaluate.statistics import Estimate, Items
from training.recipe import RecipeError
from training.run import Run

_Z = 1.96
_LOGGERS = ("lm_eval", "lm-eval")


class HarnessPart(Part):
    """One task, or group of tasks, of the harness."""

    def __init__(self, run: Run, name: str, subjects: Sequence[Subject]) -> None:
        super().__init__(run, name, "lm_eval", "lm_eval", subjects)
        if find_spec("lm_eval") is None:
            raise RecipeError(
                f"{run.recipe.path}: {self.place}: lm-evaluation-harness is not installed: pip install "
                "'baton-align[eval]'"
            )
        from lm_eval.tasks import TaskManager

        path: str | None = run.config.lm_eval_path
        with _quiet():
            self._manager = TaskManager(include_path=path, include_defaults=path is None)
        if name not in self._manager.all_tasks:
            where = f"{path} has {', '.join(sorted(self._manager.all_tasks)) or 'none'}" if path else "see its docs"
            raise RecipeError(f"{run.recipe.path}: {self.place}: the harness has no task {name}; {where}")
        self._found: dict[str, dict[str, Any]] = {}

    def measure(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> None:
        """The harness's results of one model, computed by the main process."""

        def run() -> dict[str, Any]:
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            with _quiet():
                # It changes the tokenizer's padding.
                lm = HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(subject.encoder.tokenizer), batch_size=self.batch_size
                )
                found = simple_evaluate(lm, tasks=[self.name], task_manager=self._manager, log_samples=True)
            assert found is not None
            samples = [
                {**sample, "task": task}
                for task, of_task in sorted(found["samples"].items())
                for sample in sorted(of_task, key=lambda sample: (sample["doc_id"], sample["filter"]))
            ]
            return {"results": found["results"][self.name], "samples": samples}

        self._found[subject.name] = self.run.engine.on_main(run)
        self.keys = [None] * len(_items(self._found[subject.name]))

    def items(self) -> dict[str, dict[str, Items]]:
        """{model: {metric: values of all items}}, without metrics that have no value for each item."""
        return {model: _values(found) for model, found in self._found.items()}

    def results(self, origins: Mapping[str, str]) -> dict[str, Any]:
        """As of the other tasks, with the harness's own values and standard errors."""
        found = super().results(origins)
        metrics = {
            model: {name: _estimate(value, error, self.count) for name, value, error in _metrics(one["results"])}
            for model, one in self._found.items()
        }
        names = dict.fromkeys(name for measured in metrics.values() for name in measured)
        return {**found, "metrics": metrics, "on": dict.fromkeys(names, "lm_eval")}

    def about(self) -> str:
        """How many items the harness has asked."""
        return f"{self.count} items, by lm-evaluation-harness"

    def measured_on(self) -> dict[str, str]:
        """The harness says what its metrics are measured on."""
        return {}

    def answers(self) -> Iterator[Answer]:
        """Every item, with the values of its metrics."""
        for model, found in self._found.items():
            for i, of_item in enumerate(_items(found)):
                yield _answer(self.name, i, model, of_item)


def _items(found: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The samples of each item: one for each filter."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in found["samples"]:
        grouped.setdefault((sample["task"], sample["doc_id"]), []).append(sample)
    return list(grouped.values())


def _scores(of_item: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics that have a number for the item."""
    return {
        _name(metric, sample["filter"]): float(sample[metric])
        for sample in of_item
        for metric in sample["metrics"]
        if isinstance(sample[metric], Real)
    }


def _values(found: Mapping[str, Any]) -> dict[str, Items]:
    rows = [_scores(of_item) for of_item in _items(found)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: Items([row.get(name) for row in rows]) for name in names}


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """(metric, value, standard error) of the harness's results: `acc,none`, `acc_stderr,none`."""
    for key, value in results.items():
        metric, comma, by = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            error = results.get(f"{metric}_stderr,{by}")
            yield _name(metric, by), float(value), float(error) if isinstance(error, Real) else None


def _name(metric: str, by: str) -> str:
    """`acc`, or with a filter of its own `exact_match,strict-match`."""
    return metric if by == "none" else f"{metric},{by}"


def _estimate(value: float, error: float | None, n: int) -> Estimate:
    spread = 0.0 if error is None else _Z * error
    return Estimate(value=value, low=value - spread, high=value + spread, n=n)


def _answer(task: str, item: int, model: str, of_item: Sequence[Mapping[str, Any]]) -> Answer:
    first = of_item[0]
    asked, responses = first["arguments"], first["resps"]
    prompt, scores = [Message("user", str(asked[0][0]))], dict[str, float | None](_scores(of_item))
    if isinstance(responses[0][0], str):
        return Answer(
            task, item, model, "greedy", prompt=prompt, answer=responses[0][0], reference=str(first["target"]),
            scores=scores,
        )  # fmt: skip
    likelihoods = [float(np.ravel(np.asarray(one[0], dtype=np.float64))[0]) for one in responses]
    if len(likelihoods) < 2:
        return Answer(task, item, model, "document", prompt=prompt, scores=scores, log_likelihoods=likelihoods)
    options = [str(one[1]).strip() for one in asked][: len(likelihoods)]
    choice, right = int(np.argmax(likelihoods)), first["target"]
    known = isinstance(right, int) and 0 <= right < len(options)
    return Answer(
        task, item, model, "choices", prompt=prompt, answer=options[choice],
        reference=options[right] if known else str(right), scores=scores, options=options,
        log_likelihoods=likelihoods, choice=choice, right=right if known else None,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the harness logs errors only."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
