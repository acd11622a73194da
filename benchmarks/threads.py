"""How long a training step takes on a machine that is idle, and on one that has other work.

    python -m benchmarks.threads [--json FILE]

A step of a 5 M-parameter Llama with two threads: with the waiting of `training.threads`, and with OpenMP's default.
Each side runs in a process of its own, in turn. Beside it run none, two or four processes that never wait.

- `step_idle`: steps per second alone.
- `step_beside_2`, `step_beside_4`: the same beside as many busy processes. The fair share of two threads among N busy
  processes is 2 / (2 + N) of the idle rate; what each side got of it is printed below the table.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.table import Row, json_path, report
from training.threads import settle

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2
SETTINGS = ("OMP_DYNAMIC", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measured(settings: Mapping[str, str]) -> float:
    """Steps per second in a process with these variables."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, str(Path(__file__).with_name("threads_step.py")), str(THREADS)]
    done = subprocess.run(command, cwd=ROOT, env=kept | dict(settings), stdout=subprocess.PIPE, text=True, check=True)
    return float(1 / json.loads(done.stdout))


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that never wait."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def main(path: Path | None, turns: int = 5) -> None:
    """Measures and reports."""
    settle()
    ours = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    rows = []
    for load in (0, 2, 4):
        with busy(load):
            pairs = [(measured(ours), measured({})) for _ in range(turns)]
        rows.append(
            Row(
                row=f"step_beside_{load}" if load else "step_idle",
                ours=statistics.median(a for a, _ in pairs),
                peer=statistics.median(b for _, b in pairs),
                unit="steps/s",
                ratio=statistics.median(a / b for a, b in pairs),
            )
        )
    report(rows, path)
    idle = rows[0]["peer"]
    for load, row in zip((2, 4), rows[1:], strict=True):
        fair = idle * THREADS / (THREADS + load)
        print(f"beside {load}: time in fair shares: ours {fair / row['ours']:.2f}, OpenMP's {fair / row['peer']:.2f}")


if __name__ == "__main__":
    main(json_path(__doc__.splitlines()[0]))
