"""Rollout tokens per second: our engine against `model.generate`, same 5.8 M-parameter Llama, batch 32, fp32.

    python -m benchmarks.rollout [--json FILE]

`rollout_equal`: every answer is 48 tokens. `rollout_mixed`: answers end at 4 to 128 tokens, as sampled answers do; the
peer decodes the batch until its longest answer has ended, ours drops rows that have.
"""

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.table import Row, in_turns, json_path, report
from rollout.engine import SamplingSpec, generate

PROMPT, BATCH, STOP, PAD = 32, 32, 2, 0


class EndAt(LogitsProcessor):
    """Forces the stop token when a row has as many new tokens as it is to have (peer only)."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ended = self._lengths <= input_ids.shape[1] - PROMPT + 1
        scores[:, STOP] = torch.where(ended, 1e4, -1e4)
        return scores


class Ending(torch.nn.Module):
    """The same for our engine: the model's own logits, with the stop token forced at each row's length."""

    def __init__(self, model: torch.nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.model, self._lengths = model, torch.tensor(lengths)
        self.config, self.device = model.config, model.device

    def forward(self, past_key_values, **inputs):
        out = self.model(past_key_values=past_key_values, **inputs)
        new = past_key_values.get_seq_length() - PROMPT + 1
        alive = self._lengths[self._lengths >= new]  # the engine keeps the order of the rows that are left
        out.logits[:, -1, STOP] = torch.where(alive <= new, 1e4, -1e4)
        return out


def row(name: str, model: torch.nn.Module, lengths: list[int]) -> Row:
    """One row of the table. Tokens per second, stop tokens included."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (BATCH, PROMPT), generator=g)
    tokens = sum(lengths)
    ending = Ending(model, lengths)
    spec = SamplingSpec(max(lengths), (STOP,), PAD, temperature=0.0)

    def ours() -> float:
        started = time.perf_counter()
        done = generate(ending, prompts.tolist(), spec, [(i,) for i in range(BATCH)], seed=0, batch_size=BATCH)
        assert [len(c.ids) for c in done] == lengths
        return tokens / (time.perf_counter() - started)

    def peer() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=max(lengths),
                do_sample=False,
                eos_token_id=STOP,
                pad_token_id=PAD,
                logits_processor=LogitsProcessorList([EndAt(lengths)]),
            )
        assert ((out[:, PROMPT:] != PAD).sum(-1) >= torch.tensor(lengths)).all()
        return tokens / (time.perf_counter() - started)

    return in_turns(name, "tokens/s", ours, peer)


def main(path: Path | None) -> None:
    """Runs both rows."""
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
    mixed = [4 + (124 * i) // (BATCH - 1) for i in range(BATCH)]
    report([row("rollout_equal", model, [48] * BATCH), row("rollout_mixed", model, mixed)], path)


if __name__ == "__main__":
    main(json_path(__doc__.splitlines()[0]))
