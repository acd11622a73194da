"""Where the lines of each tracker go, as the environment says. Without other settings, TensorBoard's, MLflow's and
Trackio's stay on this machine, and Weights & Biases gets them if there is a key for it."""

import netrc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from training.config import Tracker


@dataclass(frozen=True)
class Destination:
    """Where a tracker's lines go."""

    words: str
    """For the user."""
    given: dict[str, str] | None
    """The tracker's own settings (training/trackers/sinks.py); None: nothing is sent."""


def _wandb(project: str, name: str, folder: Path) -> Destination:
    """What the environment sets (WANDB_PROJECT, WANDB_NAME) holds, and wandb reads it itself. It also reads WANDB_MODE,
    WANDB_BASE_URL and the keys that are looked for here."""
    set_here = os.environ
    given = {"project": set_here.get("WANDB_PROJECT") or project, "name": set_here.get("WANDB_NAME") or name}
    mode = set_here.get("WANDB_MODE", "online").lower()
    if mode == "disabled" or set_here.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return Destination("report_to names wandb, and the environment disables wandb: nothing is sent", None)
    if mode in ("offline", "dryrun"):
        return Destination(f"metrics are kept for wandb in {folder} (WANDB_MODE is {mode})", given)
    host = urlsplit(set_here.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    if not _has_key(host):
        return Destination(
            f"report_to names wandb, but there is no key for {host}: nothing is sent. Run `wandb login` or set "
            "WANDB_API_KEY; a resumed stage then sends all lines. metrics.jsonl has everything",
            None,
        )
    return Destination(f"metrics go to wandb at {host}, project {given['project']}", given)


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return host in netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
    return False


def _tensorboard(project: str, name: str, folder: Path) -> Destination:
    return Destination(f"metrics are written for tensorboard to {folder}: `tensorboard --logdir` shows them", {})


def _mlflow(project: str, name: str, folder: Path) -> Destination:
    """What the environment sets (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME) holds."""
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
    uri = os.environ.get("MLFLOW_TRACKING_URI") or folder.absolute().as_uri()
    place = f"to {_without_password(uri)}" if os.environ.get("MLFLOW_TRACKING_URI") else f"to {folder}"
    words = f"metrics go to mlflow, {place}, experiment {project}"
    return Destination(words, {"project": project, "name": name, "uri": uri})


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _trackio(project: str, name: str, folder: Path) -> Destination:
    """What the environment sets (TRACKIO_SPACE_ID, TRACKIO_SERVER_URL, TRACKIO_DIR) holds; trackio reads it itself."""
    there = os.environ.get("TRACKIO_SERVER_URL") or os.environ.get("TRACKIO_SPACE_ID")
    place = f"at {_without_password(there)}" if there else f"in {os.environ.get('TRACKIO_DIR') or 'its own folder'}"
    return Destination(f"metrics go to trackio {place}, project {project}", {"project": project, "name": name})


DESTINATIONS: dict[Tracker, Callable[[str, str, Path], Destination]] = {
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
"""{tracker: where its lines go, by (project, name of the run, the tracker's folder in the stage's)}."""
