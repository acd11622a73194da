"""Checks before the first step that a network keeps the rows apart that are packed into one.

transformers separates packed rows by their positions, which restart at 0 (`data.packing`). Not every architecture does:
some ignore the positions, and some carry a state across the border without any error.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from training.recipe import RecipeError

if TYPE_CHECKING:
    from training.run import Run

_LENGTH = 8  # tokens of each row of the trial
# Largest difference, in standard deviations, that is rounding: experts compute tokens in groups, whose sizes matter.
_ROUNDING, _ROUNDING_BF16 = 1e-4, 0.02


def check_packing(run: "Run", wrapped: Any, bf16: bool, key: str | None) -> None:
    """Raises RecipeError if rows would see each other that the recipe's `key` packs. Does nothing without a key.

    `wrapped`: the model that the trainer has prepared; `bf16`: as for `leak`.
    """
    if key is None:
        return
    with run.engine.whole(wrapped) as model:
        fault = leak(model, bf16)
    if fault is not None:
        raise RecipeError(
            f"{run.recipe.path}: {run.section.name}.{key}: {type(model).__name__} does not keep packed rows apart: "
            f"{fault}; set {key}: false"
        )


@torch.no_grad()
def leak(model: PreTrainedModel, bf16: bool = False) -> str | None:
    """How one of two packed rows reaches the other, which must not depend on it; None if it does not.

    `bf16`: the trainer has wrapped the forward pass in autocast.
    """
    size = model.config.get_text_config(decoder=True).vocab_size
    rows = torch.arange(3 * _LENGTH, device=model.device).view(3, _LENGTH) * 7 % size
    positions = torch.arange(_LENGTH, device=model.device).repeat(2)[None]
    # FlashAttention alone needs autocast; without it a small leak does not hide in rounding.
    half = "flash" in model.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            one, other = (
                model(input_ids=torch.cat([rows[i], rows[2]])[None], position_ids=positions, use_cache=False)
                .logits[0, _LENGTH:]
                .float()
                for i in (0, 1)
            )
    except TypeError as error:  # its forward pass takes no positions
        return str(error)
    finally:
        model.train(was_training)
    moved = ((one - other).abs().max() / one.std()).item()
    if moved > (_ROUNDING_BF16 if half or bf16 or model.dtype != torch.float32 else _ROUNDING):
        return f"other tokens in one move the other's logits by {moved:.2g} of their standard deviation"
    return None
