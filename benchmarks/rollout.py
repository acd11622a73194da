"""Rollout tokens per second: our engine against `model.generate`, same 5.8 M-parameter Llama, 32 rows at once, fp32.

    python -m benchmarks.rollout [--json FILE]

- `rollout_equal`: 32 prompts of 32 tokens, every answer 48 tokens long.
- `rollout_mixed`: 128 prompts of 32 tokens, answers of 4 to 128 tokens, evenly spread and in random order. The peer
  takes 32 prompts at a time and decodes until the longest answer has ended; ours replaces each finished row by the next
  prompt.
- `rollout_shared_prompt`: 8 answers of 48 tokens to each of 4 prompts of 512 tokens.

To give answers their lengths, the benchmark overwrites the logits of the stop token, and in the mixed row of the next
token, after each side has computed everything as usual.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.table import Row, in_turns, json_path, report
from rollout.engine import generate
from rollout.forward import Runner
from rollout.sampling import SamplingSpec

BATCH, STOP, PAD, FIRST = 32, 2, 0, 3


class Ending:
    """Makes answers end at `lengths`: one length for all, or one for each answer i, whose tokens are all FIRST + i.

    prompt: length of every prompt, so that a token's position gives its index in the answer.
    """

    def __init__(self, prompt: int, lengths: Sequence[int]) -> None:
        self._prompt, self._table = prompt, torch.tensor(lengths)

    def force(self, logits: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Overwrites logits (..., V) after tokens `ids` (...) at `positions` (...).

        The values are far above the model's own, but not so far that other probabilities leave float32's normal range.
        """
        one = len(self._table) == 1
        wanted = self._table.expand(ids.shape) if one else self._table[(ids - FIRST).clamp(min=0)]
        if not one:
            logits.scatter_(-1, ids[..., None], 20.0)
        logits[..., STOP] = torch.where(positions - self._prompt + 2 >= wanted, 40.0, -40.0)

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Inside this context, overwrites logits in our engine."""
        prefill, decode = Runner.prefill, Runner.decode

        def first(runner: Runner, prompts: Sequence[Sequence[int]]) -> Any:
            logits, source = prefill(runner, prompts)
            last = torch.tensor([p[-1] for p in prompts])
            self.force(logits, last, torch.full_like(last, self._prompt - 1))
            return logits, source

        def step(runner: Runner, tokens: torch.Tensor, positions: torch.Tensor, this: Any) -> torch.Tensor:
            logits = decode(runner, tokens, positions, this)
            self.force(logits, tokens, positions)
            return logits

        with patch.object(Runner, "prefill", first), patch.object(Runner, "decode", step):
            yield

    @contextmanager
    def peer(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, in `model.generate`."""

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids, positions = (
                kwargs[name].expand(len(kwargs["input_ids"]), -1)[:, -kwargs["logits_to_keep"] :]
                for name in ("input_ids", "position_ids")
            )
            self.force(output.logits, ids, positions)

        handle = model.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def row(name: str, model: Any, prompts: list[list[int]], lengths: list[int]) -> Row:
    """One row of the table: tokens per second, stop tokens included. `model`: with transformers' `generate`, whose own
    types no model class fulfils."""
    longest, wanted = max(lengths), lengths if len(lengths) > 1 else lengths * len(prompts)
    spec = SamplingSpec(longest, (STOP,), PAD, temperature=0.0)
    keys = [(i,) for i in range(len(prompts))]
    ending = Ending(len(prompts[0]), lengths)

    def ours() -> float:
        with ending.ours():
            started = time.perf_counter()
            done = generate(model, prompts, spec, keys, seed=0, batch_size=BATCH)
            seconds = time.perf_counter() - started
        assert [len(c.ids) for c in done] == wanted
        return sum(wanted) / seconds

    def peer() -> float:
        with ending.peer(model):
            return through_generate()

    def through_generate() -> float:
        started = time.perf_counter()
        for start in range(0, len(prompts), BATCH):
            ids = torch.tensor(prompts[start : start + BATCH])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=STOP,
                pad_token_id=PAD,
            )
            assert ((out == STOP).int().argmax(-1) - ids.shape[1] + 1).tolist() == wanted[start : start + BATCH]
        return sum(wanted) / (time.perf_counter() - started)

    generate(
        model, prompts[:1], spec, keys[:1], seed=0
    )  # runs the engine's check of the model before logits are overwritten
    return in_turns(name, "tokens/s", ours, peer)


def main(path: Path | None) -> None:
    """Runs all rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    g = torch.Generator().manual_seed(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(FIRST, config.vocab_size, (count, length), generator=g).tolist()

    many = 4 * BATCH
    mixed = torch.linspace(4, 128, many).round().long()[torch.randperm(many, generator=g)].tolist()
    named = [[*prompt[:-1], FIRST + i] for i, prompt in enumerate(prompts(many, 32))]
    shared = [prompt for prompt in prompts(BATCH // 8, 512) for _ in range(8)]
    rows = [
        row("rollout_equal", model, prompts(BATCH, 32), [48]),
        row("rollout_mixed", model, named, mixed),
        row("rollout_shared_prompt", model, shared, [48]),
    ]
    report(rows, path)


if __name__ == "__main__":
    main(json_path(__doc__.splitlines()[0]))
