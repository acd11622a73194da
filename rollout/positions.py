"""How far rows may reach so that their positions do not depend on the rows beside them.

Two kinds of rotary positions, `longrope` and `dynamic`, choose the rotation of a whole batch by its longest row: up to
the window of pretraining it is the original one, beyond it another. A row would then depend on the batch, and during
generation the keys of its first tokens, rotated in one way, would meet queries rotated in the other.
"""

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from rollout.errors import RolloutError

BY_LENGTH = ("dynamic", "longrope")
"""Rotations that depend on the longest row."""


def longest_alike(config: PreTrainedConfig) -> int | None:
    """The most tokens up to which every row is rotated in one way; None: there is no such limit."""
    text = config.get_text_config(decoder=True).to_dict()
    scaling = text.get("rope_parameters") or {}
    # Architectures with several kinds of layers have the parameters of each kind.
    kinds = [kind for kind in scaling.values() if isinstance(kind, Mapping)] or [scaling]
    by_length = [kind for kind in kinds if kind.get("rope_type") in BY_LENGTH]
    # `dynamic` is read with the window that is written, whatever else its parameters say.
    keys = [kind if kind["rope_type"] == "longrope" else {} for kind in by_length]
    written = text.get("max_position_embeddings")
    return min((key.get("original_max_position_embeddings", written) for key in keys), default=None)


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Raises RolloutError if rows of up to `longest` tokens would depend on the rows beside them."""
    limit = longest_alike(model.config)
    if limit is not None and longest > limit:
        raise RolloutError(
            f"{type(model).__name__} changes the positions of all rows of a batch when one of them passes {limit} "
            f"tokens, the window before its longrope or dynamic scaling, and there are rows of up to {longest} tokens: "
            "probabilities would depend on the batch. Keep rows, each with its answer, within that window"
        )
