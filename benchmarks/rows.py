"""What data of any size costs: memory while it is encoded and trained on, and seconds until a second start is ready.

    python -m benchmarks.rows [--json FILE] [--sizes 20 2000]

SFT of a 5.8 M-parameter Llama for a few steps on JSON lines of each size (MB), every start in a process of its own. The
first start encodes; the second finds the rows. Peaks of memory are sampled: `anonymous` is what the process itself
holds (RssAnon of /proc/self/status), `all` includes the pages of mapped files, which the system takes back when it
needs them. `peer` is the limit that is promised: 300 MiB more than with the smallest file, and 5 seconds.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

import training.run
from benchmarks.rl_setup import VOCABULARY, make
from benchmarks.table import Row, report
from data.template import SPECIAL_TOKENS
from training.inputs import stage_inputs
from training.recipe import load_recipe

SIZES = (20, 2000)
"""MB of JSON lines."""
GROWTH, SECONDS = 300.0, 5.0
"""Limits: MiB of anonymous memory more than with the smallest file; seconds of a second start's data part."""
_TEXTS, _WORDS = 4096, 128
_EVERY = 0.02  # seconds between two samples of memory


class Start(TypedDict):
    """One start of the stage."""

    data: float
    """Seconds until its inputs were hashed and its rows were ready."""
    anonymous: float
    """Peak, MiB."""
    all: float
    """Peak, MiB."""
    rows: int


def write_chats(path: Path, megabytes: float) -> None:
    """JSON lines with a prompt of 128 words and an answer of 128, no two alike."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(len(SPECIAL_TOKENS), VOCABULARY)]
    texts = [" ".join(draw.choices(words, k=_WORDS)) for _ in range(_TEXTS)]
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            prompt, completion = draw.choice(texts), draw.choice(texts)
            line = json.dumps({"prompt": f"{draw.choice(words)} {prompt}", "completion": completion})
            size += file.write(line + "\n")


def recipe(folder: Path, policy: Path, data: Path) -> Path:
    """A recipe with one section, `sft`. JSON, which is YAML too."""
    section = {
        "stage": "sft",
        "parent": str(policy),
        "data": [{"source": "file", "path": str(data)}],
        "max_length": 512,
        "train": {"max_steps": 4, "global_batch_size": 8, "save_steps": 4, "logging_steps": 1},
    }
    path = folder / "recipe.yaml"
    content = {"name": "rows", "output_root": str(folder / "runs"), "stages": {"sft": section}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def start(path: Path) -> Start:
    """Runs the section in this process."""
    seconds = 0.0
    found: list[int] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal seconds
            begin = time.perf_counter()
            result = call(*args, **kwargs)
            seconds += time.perf_counter() - begin
            if isinstance(result, Sequence):
                found.append(len(result))
            return result

        return wrapper

    with (
        patch.object(training.run, "stage_inputs", timed(stage_inputs)),
        patch.object(training.run.Run, "rows", timed(training.run.Run.rows)),
        sampled() as peaks,
    ):
        training.run.run_section(load_recipe(path), "sft")
    return Start(data=seconds, anonymous=peaks["RssAnon"], all=peaks["VmRSS"], rows=sum(found))


@contextmanager
def sampled() -> Iterator[dict[str, float]]:
    """Peaks of this process's memory meanwhile, MiB, by their names in /proc/self/status."""
    peaks = {"RssAnon": 0.0, "VmRSS": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) / 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def started(path: Path) -> Start:
    """`start` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rows", "--start", str(path)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    result: Start = json.loads(done.stdout.splitlines()[-1])
    return result


def main(path: Path | None, sizes: Sequence[float] = SIZES) -> None:
    """Prints every start, and writes the rows to `path`."""
    both: list[tuple[Start, Start]] = []
    print(f"{'MB':>8}{'rows':>10}  {'start':<8}{'data':>10}{'anonymous':>14}{'all':>12}")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="benchmark-rows-") as name:
            folder = Path(name)
            policy = make(folder, "5M", (8, 8), 1, 0.0).policy
            write_chats(folder / "chats.jsonl", size)
            file = recipe(folder, policy, folder / "chats.jsonl")
            pair = started(file), started(file)
        for which, one in zip(("first", "second"), pair, strict=True):
            print(
                f"{size:>8g}{one['rows']:>10,}  {which:<8}{one['data']:>8.2f} s"
                f"{one['anonymous']:>10.0f} MiB{one['all']:>8.0f} MiB",
                flush=True,
            )
        both.append(pair)
    print()
    (smallest, _), (first, second) = both[0], both[-1]
    growth = max(1.0, first["anonymous"] - smallest["anonymous"])
    report(
        [
            Row(row="rows_growth", ours=growth, peer=GROWTH, unit="MiB", ratio=GROWTH / growth),
            Row(row="rows_second_start", ours=second["data"], peer=SECONDS, unit="s", ratio=SECONDS / second["data"]),
        ],
        path,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sizes", type=float, nargs="*", default=list(SIZES), help="MB, the smallest first")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        print(json.dumps(start(options.start)))
    else:
        main(options.json, options.sizes)
