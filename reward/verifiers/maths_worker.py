"""Compares mathematical answers in a separate process. maths_process.py runs it as a script.

It reads one JSON object per line, `{"gold": text, "answer": text, "listed": text, "seconds": s}`, and writes one,
`{"gold": whether it was understood, "equal": bool, "late": whether the CPU time ran out}`. Where "answer" is null,
it only says whether it understands the gold answer. Limits are in CPU time, so that scores are the same on a busy
machine.

A policy's text can make sympy run for ever, so there are three limits: a timer that raises inside Python code; the
kernel's limit on CPU time, for arithmetic on huge integers, which no signal handler can interrupt (this process then
dies and is started again); and a limit on memory.
"""

import functools
import json
import logging
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reward.verifiers.maths_same import Judge

MEMORY = 2 << 30  # bytes of address space
GRACE = 2  # CPU seconds between the timer and the kernel's limit


class TimeUp(BaseException):
    """Not an Exception, since math-verify and sympy catch those and continue."""


def _time_up(signum: int, frame: object) -> None:
    raise TimeUp


@functools.cache
def judge() -> "Judge":
    """Imports sympy when first called."""
    here = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, here)
    from reward.verifiers.maths_algebra import Sympy
    from reward.verifiers.maths_same import Judge

    sys.path.remove(here)
    return Judge(Sympy())


@functools.lru_cache(maxsize=4096)
def _readable(gold: str) -> bool:
    return judge().readable(gold)


def reply(gold: str, answer: str | None, listed: str, seconds: float) -> dict[str, bool]:
    """One comparison under the limits."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + GRACE
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    out = {"gold": False, "equal": False, "late": False}
    try:
        try:
            # Repeated every 0.1 s, since a library may catch the first with a bare `except`.
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
            out["gold"] = _readable(gold)
            if answer is not None:
                out["equal"] = judge().same(gold, answer, listed)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except TimeUp:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        out["late"] = True
    except Exception:  # anything that sympy raises on nonsense, including recursion and memory errors
        return out
    return out


def main() -> None:
    # Libraries may print, so replies get a copy of standard output for themselves.
    out = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # only the trainer handles it; when it ends, our input closes
    signal.signal(signal.SIGVTALRM, _time_up)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    judge().same("x", "y")  # imports and builds everything before the first request, whose time is limited
    print(json.dumps({}), file=out, flush=True)
    os.dup2(nowhere, 2)  # the trainer reads standard error only while the process starts
    for line in sys.stdin:
        print(json.dumps(reply(**json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
