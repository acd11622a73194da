"""How each tracker is given the lines. Each class imports its package when it is made, in the tracker's own process."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """One run of one tracker. It is made with the tracker's folder, the run's id and config, and what its `Destination`
    gives."""

    arrived: int | None
    """Lines that the run had when it was opened; None: the tracker cannot say."""

    def send(self, place: int, line: Mapping[str, Any]) -> None:
        """Sends one line. `place`: number of lines before it."""

    def close(self) -> None:
        """Called after the last line."""


class Wandb:
    """A run of Weights & Biases. The lines' places are its steps, so it drops a line that it has already."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any], project: str, name: str) -> None:
        import wandb

        # wandb makes its own folder, of its own name, in `dir`.
        self._run = wandb.init(
            resume="allow", dir=str(folder.parent), id=run_id, config=config, project=project, name=name
        )
        self._run.define_metric("*", step_metric="step")
        self.arrived = self._run.starting_step if self._run.resumed else None

    def send(self, place: int, line: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._run.log(dict(line), step=place, commit=True)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


class TensorBoard:
    """An event file for each start, with one event a line."""

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any]) -> None:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        files = sorted(folder.glob("events.out.tfevents.*"))
        events = (Event.FromString(raw) for file in files for raw in RawEventFileLoader(str(file)).Load())
        self.arrived = sum(event.HasField("summary") for event in events)
        self._writer = EventFileWriter(str(folder))

    def send(self, place: int, line: Mapping[str, Any]) -> None:
        """See `Sink`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers(line)]
        self._writer.add_event(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class MLflow:
    """A run of MLflow, found again by a tag with the run's id. Another tag counts the lines."""

    _ID, _LINES = "baton.run_id", "baton.lines"

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any], project: str, name: str, uri: str) -> None:
        # The extra has no database, and MLflow's file store, which serves a single run well, needs this setting.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(project)
        try:
            number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        except MlflowException:  # another stage has made it meanwhile
            experiment = self._client.get_experiment_by_name(project)
            if experiment is None:
                raise
            number = experiment.experiment_id
        found = self._client.search_runs([number], f"tags.`{self._ID}` = '{run_id}'")
        run = found[0] if found else self._client.create_run(number, run_name=name, tags={self._ID: run_id})
        self._run, self._stage = run.info.run_id, folder.parent.parent
        if found:
            self._client.update_run(self._run, status="RUNNING")
        self.arrived = int(run.data.tags.get(self._LINES, 0))
        self._first = True
        if not run.data.params:
            self._log_params(config)

    def _log_params(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(_key(key), str(value)[:500]) for key, value in _flat(config)]
        for start in range(0, len(params), 100):  # as many as one request may have
            self._client.log_batch(self._run, params=params[start : start + 100])

    def send(self, place: int, line: Mapping[str, Any]) -> None:
        """See `Sink`."""
        from mlflow.entities import Metric, RunTag

        step, now = line["step"], int(time.time() * 1000)
        metrics = [Metric(_key(key), value, now, step) for key, value in numbers(line)]
        if self._first:  # an earlier process may have died in the middle of this line
            metrics = [one for one in metrics if not self._has(one)]
            self._first = False
        self._client.log_batch(self._run, metrics=metrics, tags=[RunTag(self._LINES, str(place + 1))])

    def _has(self, metric: Any) -> bool:
        history = self._client.get_metric_history(self._run, metric.key)
        return any((one.step, one.value) == (metric.step, metric.value) for one in history)

    def close(self) -> None:
        """See `Sink`."""
        published = (self._stage / "stage.json").is_file()
        self._client.set_terminated(self._run, "FINISHED" if published else "KILLED")


class Trackio:
    """A run of Trackio, which is found again by its name. Trackio cannot say which lines it has."""

    arrived = None

    def __init__(self, folder: Path, run_id: str, config: dict[str, Any], project: str, name: str) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=project, name=f"{name}-{run_id[:6]}", config=config, resume="allow")

    def send(self, place: int, line: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._trackio.log(dict(numbers(line)), step=line["step"])

    def close(self) -> None:
        """See `Sink`."""
        self._trackio.finish()


SINKS = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": MLflow, "trackio": Trackio}


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line but its step. Trackers that draw curves take nothing else; metrics.jsonl has the rest."""
    for key, value in line.items():
        if key != "step" and isinstance(value, int | float):
            yield key, float(value)


def _key(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a mapping."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
