"""Loads a model under the launch file's engine, and writes what each process held at most meanwhile, as a share of the
model's files: frozen as they are stored, and trained in float32.

accelerate launch --config_file FILE -m tests.loading_shares SMALL LARGE OUT: two model directories; the small one is
loaded first, so that imports and buffers of the libraries do not count.
"""

import json
import sys
from pathlib import Path
from typing import Any


def program(small: Path, large: Path, out: Path) -> None:
    from training import engines

    engine = engines.start()
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.turns import forget_peak, resident
    from handoff.parent import open_parent
    from training.config import ModelArguments, OptimizerConfig
    from training.model import Model, load_encoder

    def load(folder: Path, **keys: Any) -> Model:
        parent = open_parent(str(folder), folder, {"causal_lm"})
        return Model.load(engine, parent, "policy", load_encoder(parent), ModelArguments(), **keys)

    def trained(model: Model) -> object:
        engine.set_up(OptimizerConfig(learning_rate=0.01), width=16)
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
        prepared, _ = engine.prepare(model.module, optimizer)
        model.fill(prepared)
        return prepared

    def grown() -> list[float]:
        return [grown / size for grown in engine.of_all(resident("VmHWM") - before)]

    disable_progress_bar()
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    seen = {}
    as_stored = {"dtype": None, "frozen": True}
    for part, ready, keys in (("frozen", lambda model: model.freeze().module, as_stored), ("trained", trained, {})):
        ready(load(small, **keys))
        engine.release_memory()
        before = forget_peak()
        model = load(large, **keys)
        loaded = grown()
        prepared = ready(model)
        peaks = grown()
        # Each process gets the whole tensors.
        sums = {entry.name: entry.whole().double().sum().item() for entry in engine.weights(prepared)}
        seen[part] = {"loaded": loaded, "ready": peaks, "sums": engine.of_all(sums)}
        del model, prepared
    if engine.is_main:
        out.write_text(json.dumps(seen))
    engine.shutdown()


if __name__ == "__main__":
    program(*map(Path, sys.argv[1:]))
