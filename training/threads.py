"""How the threads of a process wait for one another.

A matrix product that two threads share ends when the slower one ends. By default, the other one spins in GNU's OpenMP
for about 300,000 rounds, which is as long as a time slice of the scheduler. On a machine that has other work, it
thereby takes the core that the slower one waits for, and a step takes several times its fair share
(docs/performance.md). Here the thread sleeps after fewer rounds, which an idle machine hardly notices. No torch in this
file: OpenMP reads its variables once, when torch is loaded.
"""

import os

SPIN_ROUNDS = 3000
"""Chosen by `benchmarks.threads`: fewer rounds cost time on an idle machine, more cost time on a loaded one."""


def settle() -> None:
    """Sets the variables that OpenMP reads, for this process and its children. Call it before torch is imported.

    The number of threads, and so the result, never depends on the machine's load. A waiting time that the user has
    chosen (`OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`) stays.
    """
    os.environ["OMP_DYNAMIC"] = "FALSE"
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_ROUNDS))
