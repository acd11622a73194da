"""Weights & Biases as a mirror of metrics.jsonl: it may be slow, hang or die, and no step waits for it."""

import logging
import queue
import threading
from typing import Any

logger = logging.getLogger(__name__)


class WandbMirror:
    """Sends metrics from a thread of its own. The run id is the caller's: a resumed stage goes on in its run."""

    def __init__(self, project: str, name: str, run_id: str, config: dict[str, Any], folder: str) -> None:
        self._settings = {"project": project, "name": name, "id": run_id, "config": config, "dir": folder}
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, Any]) -> None:
        """Hands over one line; `step` is the x-axis."""
        self._queue.put(metrics)

    def close(self) -> None:
        """Lets a living connection finish for half a minute; one that never came up gets a second."""
        self._queue.put(None)
        self._thread.join(timeout=30 if self._started.is_set() else 1)
        if self._thread.is_alive():
            logger.warning("wandb did not answer and was left behind; metrics.jsonl has everything")

    def _work(self) -> None:
        try:
            import wandb

            run = wandb.init(resume="allow", **self._settings)
            run.define_metric("*", step_metric="step")
            self._started.set()
            while (line := self._queue.get()) is not None:
                run.log(line)
            run.finish()
        except Exception as error:  # whatever happens to the mirror, the training goes on
            logger.warning("wandb stopped (%s: %s); metrics.jsonl has everything", type(error).__name__, error)
