"""GPUs, their memory and their speed, from their makers' data sheets. No torch here.

Memory is the number on the data sheet in GiB, less what the driver keeps of it. FLOP/s are dense bfloat16 with float32
accumulation, without sparsity; data sheets that state the sparse rate state twice that.

| GPU | source |
| --- | --- |
| h200, h100, h100-pcie | NVIDIA H200 and H100 Tensor Core GPU data sheets |
| a100, a100-40 | NVIDIA A100 Tensor Core GPU data sheet |
| l40s, l4, a10g, t4 | NVIDIA L40S, L4, A10 and T4 data sheets |
| rtx6000 | NVIDIA RTX 6000 Ada Generation data sheet |
| 4090, 3090 | NVIDIA Ada and Ampere GA102 GPU architecture white papers, appendix A |
| mi300x | AMD Instinct MI300X data sheet |
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handoff.errors import UserError

GIB = 2**30
_KEPT = 0.97  # share of the memory that a program can have
_CONTEXT = 0.6 * GIB  # of the driver, the libraries' kernels and their workspace


@dataclass(frozen=True)
class Device:
    """What one process runs on."""

    name: str
    memory: float
    """Bytes that one process can have."""
    flops: float | None = None
    """Peak FLOP/s in bfloat16; None: not known."""
    kind: Literal["cpu", "cuda"] = "cuda"
    bf16: bool = True
    """Whether it multiplies bfloat16 matrices."""
    base: float = _CONTEXT
    """Bytes that a process takes before it has a model."""


def _gpu(name: str, gib: float, tera: float, *, bf16: bool = True) -> Device:
    return Device(name, gib * GIB * _KEPT, tera * 1e12, bf16=bf16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 141e9 / GIB, 989),
        _gpu("h100", 80, 989),
        _gpu("h100-pcie", 80, 756),
        _gpu("a100", 80, 312),
        _gpu("a100-40", 40, 312),
        _gpu("l40s", 48, 362),
        _gpu("rtx6000", 48, 364),
        _gpu("4090", 24, 165),
        _gpu("3090", 24, 71),
        _gpu("l4", 24, 121),
        _gpu("a10g", 24, 70),
        _gpu("t4", 16, 65, bf16=False),
        _gpu("mi300x", 192, 1307),
    )
}


def gpu(name: str) -> Device:
    """A GPU by its name. Raises UserError."""
    found = GPUS.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}: there are {', '.join(GPUS)}")
    return found


def found_gpu(name: str, memory: int, *, bf16: bool) -> Device:
    """A GPU of this machine, by what torch says of it; `memory` in bytes."""
    return Device(name, memory * _KEPT, bf16=bf16)


_LIBRARIES = 60 * 2**20
"""What a process on a CPU takes besides tensors: parts of libraries that only computing loads, rows, threads."""
_IMPORTS = 0.6 * GIB
"""What it takes before that, by its imports."""


def this_cpu(processes: int) -> Device:
    """This machine's memory, shared by that many processes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        total = min(total, int(text))
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.is_file() else set()
    bf16 = bool(words & {"avx512_bf16", "amx_bf16"})
    return Device("this CPU", total / processes - _IMPORTS, None, "cpu", bf16, _LIBRARIES)
