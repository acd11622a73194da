"""What torch's elastic agent leaves to the processes that it starts and, with `--max_restarts`, starts again.

The agent (in `accelerate launch`) starts its processes again whatever their exit code was. So a stage that ended for
good notes its code, with which the next start ends at once. And an agent that is killed leaves its processes behind,
which would train beside those of its successor. No torch here.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from reward.sandbox.confine import die_with_parent, load_libc
from training.engines.launch import LaunchError

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With this variable set to 1, each start has a new place where its processes find each other."""


def begin() -> None:
    """Called first by a stage's process. Ends it, if an earlier start under the same agent has ended for good.

    Raises:
        LaunchError: torch would start the processes of several machines again in a way that does not work: they find
            the addresses of the earlier start, and an agent that takes another one's place finds none (torch 2.13).
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    die_with_parent(load_libc())
    record = _record()
    with suppress(OSError, ValueError):
        if record is not None:
            sys.exit(int(record.read_text()))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if _restarts() and shared and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        raise LaunchError(f"--max_restarts on several machines needs {OWN_STORE}=1 in the environment of each launcher")


def end(code: int, *, for_good: bool = True) -> NoReturn:
    """Ends the process. `for_good`: another start would end like this one."""
    record = _record()
    if for_good and record is not None:
        with suppress(OSError):  # the launch is ending
            record.write_text(str(code))
    sys.exit(code)


def _record() -> Path | None:
    """A file that all starts under this agent share; None if it starts nothing again."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # <folder of the launch>/attempt_1/<local rank>/error.json
    return Path(own).parent.parent.parent / "ended" if own and _restarts() else None


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
