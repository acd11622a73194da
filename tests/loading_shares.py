"""Loads a model under the launch file's engine, and writes what each process held at most meanwhile.

accelerate launch --config_file FILE -m tests.loading_shares SMALL LARGE OUT: two model directories; the small one is
loaded first, so that imports and buffers of the libraries do not count.
"""

import json
import sys
from pathlib import Path


def program(small: Path, large: Path, out: Path) -> None:
    from training import engines

    engine = engines.start()
    import torch

    from benchmarks.turns import forget_peak, resident
    from handoff.parent import open_parent
    from training.config import ModelArguments, OptimizerConfig
    from training.model import Model, load_encoder

    def load(folder: Path) -> Model:
        parent = open_parent(str(folder), folder, {"causal_lm"})
        return Model.load(engine, parent, "policy", load_encoder(parent), ModelArguments())

    def frozen(folder: Path) -> tuple[Model, object]:
        model = load(folder).freeze()
        return model, model.module

    def trained(folder: Path) -> tuple[Model, object]:
        model = load(folder)
        engine.set_up(OptimizerConfig(), width=16)
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
        prepared, _ = engine.prepare(model.module, optimizer)
        model.fill(prepared)
        return model, prepared

    seen = {}
    for make in (frozen, trained):
        make(small)
        engine.release_memory()
        before = forget_peak()
        model, prepared = make(large)
        peak = resident("VmHWM") - before
        entries = engine.weights(prepared)
        # A weight that differs from place to place; each process sees the whole ones.
        whole = {entry.name: entry.whole().double().sum().item() for entry in entries}
        size = 4 * sum(entry.whole().numel() for entry in entries)
        seen[make.__name__] = {"peaks": [p / size for p in engine.of_all(peak)], "sums": engine.of_all(whole)}
        del model, prepared, entries
    if engine.is_main:
        out.write_text(json.dumps(seen))
    engine.shutdown()


if __name__ == "__main__":
    program(*map(Path, sys.argv[1:]))
