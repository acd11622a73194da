"""The precision of a model's weights: of those that are trained, of frozen ones, and of what is published."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Literal

import torch

from handoff.parent import Parent
from handoff.weights import read_tensors
from training.config import AdapterConfig, TrainedModelArguments
from training.engines.protocol import Engine
from training.engines.single import Entry

PublishDtype = Literal["auto", "float32", "bfloat16", "float16"]
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def precision(parent: Parent, *, beside: bool) -> torch.dtype:
    """The precision in which the parent's weights are held if they are not trained: that of its files if all of them
    have the same, otherwise float32.

    Args:
        parent: a whole model or an adapter.
        beside: an adapter will stand beside its base's weights. One that is merged into them needs float32.
    """
    kinds = {info.dtype for info in read_tensors(parent.weights_dir).values()}
    stay = parent.base is None or beside
    return _STORED.get(kinds.pop(), torch.float32) if len(kinds) == 1 and stay else torch.float32


def answering_dtype(engine: Engine) -> torch.dtype | None:
    """The precision of the weights of a model that only answers; None: the parent's, which gives the same numbers.

    On a CPU it is float32: there is more memory, and no time to convert the weights at every token.
    """
    return torch.float32 if engine.device.type == "cpu" else None


def trained_dtype(
    engine: Engine, arguments: TrainedModelArguments, adapter: AdapterConfig | None
) -> torch.dtype | None:
    """The precision of the weights of a model that is trained; None: those below an adapter stay as they are stored.

    Raises:
        LaunchError: bfloat16 under an engine that keeps and trains float32 weights anyway.
    """
    if arguments.dtype == "auto":  # an engine that shards has one precision for all weights of a model
        return None if adapter is not None and not engine.splits else torch.float32
    dtype = _NAMED[arguments.dtype]
    engine.check_trained_dtype(dtype)
    return dtype


class Published:
    """The precision of the tensors of a published model."""

    def __init__(self, asked: PublishDtype, parent: Parent | None) -> None:
        """
        Args:
            asked: the recipe's `publish_dtype`; `auto`: each tensor has its precision in the parent's files.
            parent: None or a tokenizer for random weights, which are published in float32 with `auto`.
        """
        self.asked = None if asked == "auto" else _NAMED[asked]
        self._stored: dict[str, torch.dtype] = {}
        sizes: Counter[torch.dtype] = Counter({torch.float32: 0})
        if self.asked is None and parent is not None and parent.kind != "tokenizer":
            for name, info in read_tensors(parent.weights_dir).items():
                if info.dtype in _STORED:  # others are quantised weights, and integers
                    self._stored[name] = _STORED[info.dtype]
                    sizes[_STORED[info.dtype]] += prod(info.shape)
        self.main = self.asked or max(sizes, key=lambda dtype: sizes[dtype])
        """That of tensors that the parent does not have; it stands in config.json."""

    def of(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries, under their published names, with the precision in which they are written."""
        return [
            replace(entry, dtype=self.asked or self._stored.get(entry.name, self.main))
            if entry.dtype.is_floating_point
            else entry
            for entry in entries
        ]
