"""Errors of waiting for other processes that cannot be reached any more, in words that say who waited for what."""

import re
import socket
import traceback
from pathlib import Path

from training.engines.launch import rank, world_size

_ROOT = Path(__file__).resolve().parent.parent.parent
# gloo raises plain RuntimeErrors; they begin with the place in its source, or name it.
_GLOO = re.compile(r"gloo/transport/|Gloo|Connection closed by peer|Connection reset by peer")


class PeersLost(Exception):
    """Other processes ended, or did not answer in time."""


class NoAnswer(Exception):
    """Another process ended or was lost while this one waited for it outside of a collective (meeting.py)."""


def peers_lost(error: BaseException) -> PeersLost | None:
    """The error in words, if other processes were lost for which this one waited; otherwise None."""
    if world_size() == 1 or not (isinstance(error, NoAnswer) or _is_of_a_collective(error)):
        return None
    return PeersLost(
        f"process {rank()} of {world_size()} on {socket.gethostname()} waited for the other processes {_where(error)}: "
        f"{reason_of(error)}. If another process says why it ended, that is the cause. The same command goes on from "
        "the last saved state"
    )


def reason_of(error: BaseException) -> str:
    """What an error of a collective says, on one line, without the place in gloo's source."""
    reason = " ".join(str(error).split())
    reason = re.sub(r"^\[?(enforce fail at )?\S*gloo/transport/\S+\]? *", "", reason)
    return reason[:300] or type(error).__name__


def _is_of_a_collective(error: BaseException) -> bool:
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and _GLOO.search(str(error)) is not None)


def _where(error: BaseException) -> str:
    """The innermost function of this project in the error's traceback, outside of the engines if there is one."""
    frames = [frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if _is_ours(Path(frame.filename))]
    callers = [frame for frame in frames if Path(frame.filename).parent != Path(__file__).parent]
    for frame in callers or frames:
        return f"in {frame.name} ({Path(frame.filename).relative_to(_ROOT)}, line {frame.lineno})"
    return "in a library's code"


def _is_ours(path: Path) -> bool:
    return path.is_relative_to(_ROOT) and ".venv" not in path.parts
