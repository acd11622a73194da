"""Forward passes of a causal language model with rollout attention, and the check that a model supports it.

Legend: N prompts, B rows, T tokens of all prompts together, V vocabulary.

The check runs the model with both attentions on the first tokens of a prompt and compares the logits. A model's
configuration does not show everything: one with its own mask (bidirectional in the prompt, chunked), biases in the mask
(ALiBi), or a state besides keys and values would give wrong answers without any error.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from rollout.attention import NAME, Decode, Prefill, Unstored, UnsupportedError, in_force
from rollout.lean import Lean, fits
from rollout.slots import Shape, Slots

_log = logging.getLogger(__name__)
_checked: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_PROBE = 12  # tokens

Source = list[tuple[Tensor, Tensor]]  # keys and values (H, T, D) of each layer


class Runner:
    """Runs one model; valid only inside `attached`."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[int | None]) -> None:
        self._model, self._windows = model, windows
        self._cache = Unstored()
        self._fits = fits(model)
        self._lean: Lean | None = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Source]:
        """Logits after each prompt (N, V), and the concatenated prompts' keys and values."""
        lengths = [len(p) for p in prompts]
        device = self._model.device
        ids = torch.tensor([t for p in prompts for t in p], device=device)[None]  # (1, T)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        this = Prefill(lengths, self._windows)
        with in_force(this):
            logits = self._forward(ids, positions, last)
        if len(this.layers) != len(self._windows):
            raise UnsupportedError(f"{len(this.layers)} of its {len(self._windows)} layers have attention")
        if logits.shape[:2] != (1, len(prompts)):
            raise UnsupportedError("it ignores logits_to_keep and computes logits of all positions")
        return logits[0], [this.layers[i] for i in range(len(this.layers))]

    def logits(self, prompt: Sequence[int], where: Sequence[int]) -> Tensor:
        """Logits after the tokens of a prompt at the places `where`: (places, V)."""
        ids, positions = self._alone(prompt)
        with in_force(Prefill([len(prompt)], self._windows)):
            return self._forward(ids, positions, torch.tensor(where, device=ids.device))[0]

    def hidden(self, prompt: Sequence[int]) -> Tensor:
        """The last hidden state of each token of a prompt (T, C)."""
        ids, positions = self._alone(prompt)
        with in_force(Prefill([len(prompt)], self._windows)):
            found: Tensor = self._model.base_model(
                input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True
            ).last_hidden_state[0]
        return found

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self._model.config.get_text_config(decoder=True).vocab_size)

    def decode(self, tokens: Tensor, positions: Tensor, this: Decode) -> Tensor:
        """Logits (B, V) after one token per row. tokens, positions (B,)."""
        if self._fits and self._lean is None:
            self._lean = Lean(self._model)
        if self._lean is not None:
            return self._lean(tokens, positions, this)
        with in_force(this):
            return self._forward(tokens[:, None], positions[:, None], 1)[:, -1]

    def slots(self, source: Source, rows: int, columns: int, *, whole: bool = False, growing: bool = True) -> Slots:
        """Slots for keys and values of these shapes. whole: every layer sees the whole row."""
        shapes = [
            Shape(k.shape[0], k.shape[2], v.shape[2], None if whole else window)
            for (k, v), window in zip(source, self._windows, strict=True)
        ]
        value = source[0][1]  # under autocast, the rotation may have turned keys into float32
        return Slots(shapes, rows, columns, value.dtype, value.device, growing=growing)

    def shortest_window(self) -> int | None:
        """The shortest window of all layers; None if every layer sees all tokens."""
        return min((w for w in self._windows if w is not None), default=None)

    def _alone(self, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and positions (1, T)."""
        device = self._model.device
        return torch.tensor([list(prompt)], device=device), torch.arange(len(prompt), device=device)[None]

    def _forward(self, ids: Tensor, positions: Tensor, keep: int | Tensor) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=keep
        ).logits
        return logits


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[Runner]:
    """Replaces the model's attention by rollout attention, and restores it at the end."""
    changed = configs(model.config)
    own = [c._attn_implementation for c in changed]
    try:
        for config in changed:
            config._attn_implementation = NAME
        yield Runner(model, windows(model))
    finally:
        for config, name in zip(changed, own, strict=True):
            config._attn_implementation = name


def reason_against(model: PreTrainedModel, prompt: Sequence[int]) -> str | None:
    """Why the model does not support rollout attention; None if it does. `model` must be in evaluation mode."""
    if model not in _checked:
        _checked[model] = _check(model, list(prompt)[:_PROBE])
        if _checked[model] is not None:
            _log.warning(
                "%s: rollouts use the slower plain generation, because %s", type(model).__name__, _checked[model]
            )
    return _checked[model]


def _check(model: PreTrainedModel, ids: list[int]) -> str | None:
    prompts = [ids, ids[: max(len(ids) // 2, 1)]]
    try:
        with torch.autocast(model.device.type, enabled=False):
            expected = [
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1]
                for prompt in prompts
                for row in (prompt, prompt + ids[:1])
            ]
            with attached(model) as runner:
                first, source = runner.prefill(prompts)
                slots = runner.slots(source, len(prompts), len(ids) + 1)
                slots.exchange([], [len(p) for p in prompts])
                start = 0
                for row, prompt in enumerate(prompts):
                    slots.fill(row, source, start, len(prompt))
                    start += len(prompt)
                slots.settle()
                slots.advance()
                positions = torch.tensor([len(p) for p in prompts], device=model.device)
                tokens = torch.tensor([ids[0]] * len(prompts), device=model.device)
                second = runner.decode(tokens, positions, Decode(slots))
    except UnsupportedError as error:
        return str(error)
    except Exception as error:  # a foreign model's code may raise anything when its attention or cache is replaced
        return f"a trial of its forward pass failed: {type(error).__name__}: {error}"
    return deviation(torch.stack([first[0], second[0], first[1], second[1]]), torch.stack(expected), "its logits come")


def deviation(got: Tensor, want: Tensor, what: str) -> str | None:
    """A message if `got` differs from the result of the model's own attention by more than rounding, else None.

    None also if the numbers are not finite (broken weights), since they cannot be compared.
    """
    got, want, allowed = got.float(), want.float(), 1e-3 if want.dtype == torch.float32 else 0.1
    difference = ((got - want).abs().max() / want.std()).item()
    if not difference < allowed and want.isfinite().all():
        return f"{what} out {difference:.2g} standard deviations off"
    return None


def configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration and its nested ones, outer before inner, since setting an outer one also sets the inner."""
    inner = [getattr(config, name) for name in config.sub_configs]
    return [config, *(c for part in inner if part is not None for c in configs(part))]


def windows(model: PreTrainedModel) -> list[int | None]:
    """How many tokens back each layer sees; None means all of them."""
    types, arguments = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    others = sorted(set(types) - {"full_attention", "sliding_attention"})
    if others:
        raise UnsupportedError(f"it has layers of type {', '.join(others)}")
    return [a["sliding_window"] if t == "sliding_attention" else None for t, a in zip(types, arguments, strict=True)]
