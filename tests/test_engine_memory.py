"""Memory that only freed tensors stood on (`Engine.release_memory`)."""

import platform
import subprocess
import sys

import pytest

# 400 tensors of 1 MiB; every second one is freed, so that a live tensor follows each gap.
LEAVE_GAPS = """
import sys
import torch
from training import engines
from training.engines import single

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

engine = engines.start()
if "another C library" in sys.argv:
    single.ctypes.CDLL = lambda name: object()
torch.ones(2**22).sum()  # a freed block of 16 MiB: from now on smaller ones come from the heap
tensors = [torch.ones(2**18) for _ in range(400)]
before = resident()
del tensors[::2]
gaps = resident()
engine.release_memory()
print(before, gaps, resident(), float(sum(tensor.sum() for tensor in tensors)))
"""


def _measure(*arguments: str) -> list[float]:
    command = [sys.executable, "-c", LEAVE_GAPS, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps the pages")
def test_freed_pages_are_returned_to_the_system() -> None:
    before, gaps, after, total = _measure()
    assert gaps > before - 20, "freeing alone returns them: the call has nothing left to do"
    assert after < gaps - 150
    assert total == 200 * 2**18


def test_another_c_library_is_left_alone() -> None:
    *_, total = _measure("another C library")
    assert total == 200 * 2**18
