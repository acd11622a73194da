"""Writes a language model as ONNX, with any number of rows and tokens, and compares it with the model.

Inputs: `input_ids` and `attention_mask`, (B, T) int64; 0 in the mask is padding. Output: `logits`, (B, T, V) float32.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.export.check import CheckFailed, Expected, Verdict
from handoff.errors import HandoffError

if TYPE_CHECKING:
    from training.model import Model

NAME = "model.onnx"
LARGEST = 1e-4
"""Largest difference of a log-probability, in nats."""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRIED = 4
"""Rows that are compared, in one batch."""


def need_onnx() -> None:
    """Raises HandoffError if a package is missing."""
    if any(importlib.util.find_spec(name) is None for name in _PACKAGES):
        raise HandoffError("writing ONNX needs packages: pip install 'baton-align[onnx]'")


def write_onnx(model: "Model", folder: Path) -> None:
    """Writes the model, its tokenizer and its settings.

    Raises:
        HandoffError: torch cannot export this architecture.
    """
    import torch
    from torch.export import Dim

    from training.model_files import in_words, write_configuration

    module = model.module
    template = None if model.parent is None else model.parent.chat_template
    write_configuration(folder, module.config, torch.float32, type(module).__name__, model.encoder, template)
    ids = torch.arange(2 * 5, device=module.device).reshape(2, 5)
    shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    try:
        torch.onnx.export(
            _logits_alone(module),
            (ids, torch.ones_like(ids)),
            folder / NAME,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            dynamo=True,
            verbose=False,
        )
    except OSError:
        raise
    except Exception as error:  # each pass raises its own errors
        raise HandoffError(
            f"{model.encoder.tokenizer.name_or_path}: torch cannot export {type(module).__name__} to ONNX: "
            f"{in_words(error)[:500]}"
        ) from error


def check_onnx(model: "Model", folder: Path, expected: Expected) -> Verdict:
    """Compares log-probabilities of single rows and of a padded batch, as onnxruntime and torch compute them.

    Raises:
        CheckFailed: they differ by more than `LARGEST`.
    """
    import numpy as np
    import onnxruntime
    import torch

    session: Any = onnxruntime.InferenceSession(str(folder / NAME), providers=["CPUExecutionProvider"])
    verdict = Verdict(f"onnxruntime {onnxruntime.__version__}")
    rows = sorted(expected.rows, key=len)
    several = [*rows[: _TRIED // 2], *rows[-_TRIED // 2 :]]
    largest = 0.0
    positions = 0
    for batch in ([several[-1]], several):
        ids, mask = _padded(batch, expected.encoder.pad_id)
        with torch.inference_mode():
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            inputs = {name: value.to(model.module.device) for name, value in inputs.items()}
            wanted = model.module(**inputs, use_cache=False).logits.float().log_softmax(-1).cpu()
        logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        found = torch.from_numpy(np.asarray(logits, dtype=np.float32)).log_softmax(-1)
        real = torch.from_numpy(mask).bool()
        largest = max(largest, float((found - wanted)[real].abs().max()))
        positions += int(real.sum())
    if not largest <= LARGEST:
        raise CheckFailed(
            f"{verdict.by} answers otherwise than the stage: |Δ log p| {largest:.1e}, at most {LARGEST:g}"
        )
    verdict.said.append(f"over {positions} positions, |Δ log p| of any token is at most {largest:.1e}")
    verdict.numbers |= {"positions": positions, "largest_difference": largest}
    return verdict


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Any, Any]:
    """Ids and mask, (B, T) int64, padded on the right."""
    import numpy as np

    longest = max(map(len, rows))
    ids = np.array([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=np.int64)
    return ids, mask


def _logits_alone(module: Any) -> Any:
    """A module from ids and mask to logits alone."""
    from torch import nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    return Logits().eval()
