"""python -m benchmarks [NAME ...] [--json FOLDER]: the named benchmarks, or all that measure speed, in turn."""

import argparse
import importlib
from pathlib import Path

# Benchmarks of learning take hours, and run only when they are named.
SPEED = (
    "rollout",
    "rl",
    "adapters",
    "exchange",
    "scaling",
    "checkpoint_cost",
    "rows",
    "threads",
    "serve",
    "evaluation",
)
LEARNING = ("verifiable", "overoptimization", "adapter_learning", "real_model")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SPEED + LEARNING)}; by default {', '.join(SPEED)}")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write each one's rows to FOLDER/NAME.json")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in SPEED + LEARNING]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}: there are {', '.join(SPEED + LEARNING)}")
    if options.json is not None:
        options.json.mkdir(parents=True, exist_ok=True)
    for name in options.names or SPEED:
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main(options.json and options.json / f"{name}.json")
