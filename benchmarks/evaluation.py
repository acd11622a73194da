"""Speed of evaluation: ours against lm-evaluation-harness's HF backend, the same model, rows and batch size, fp32.

    python -m benchmarks.evaluation [--smollm2] [--json FILE]

- `eval_generate`: greedy answers of 64 new tokens to GSM8K's questions in the harness's prompt; answers a second.
- `eval_loglikelihood`: the likelihoods of the choices of ARC-Easy's questions; choices a second.

The model is the 5.8 M-parameter Llama of `benchmarks.rollout` with random weights, so that no answer ends early, and a
tokenizer of at most 4,096 entries that is trained on the questions. With --smollm2 there are two more rows, with
SmolLM2-135M-Instruct, whose answers end when they end. Both sides tokenize, decode and take the answers apart by
themselves. The rows are those of ../shared/data (docs/real.md).
"""

import argparse
import copy
import gzip
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.real_model import fetch
from benchmarks.table import Row, in_turns, report
from data.encode import Encoder
from rollout.engine import generate
from rollout.sampling import SamplingSpec
from stages.evaluate import choices, trees

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
BATCH, NEW = 16, 64
UNTIL = ["Question:", "</s>", "<|im_end|>"]
END = "<|im_end|>"


def main(path: Path | None, *, smollm2: bool = False, prompts: int = 48, questions: int = 96) -> None:
    """Runs all rows. `prompts`, `questions`: how many of them are asked."""
    asked = [f"Question: {row['question']}\nAnswer:" for row in rows("verifiable/gsm8k-train.jsonl.gz", prompts)]
    arc = [(f"{row['query']}\nAnswer:", tuple(row["choices"])) for row in rows("eval/arc-easy.jsonl.gz", questions)]
    tried = {"": random_llama(asked)}
    if smollm2:
        tried["_smollm2"] = published()
    table = []
    for name, (model, tokenizer) in tried.items():
        few = 1 if not name else 4  # a larger model takes longer
        table += [
            answers(f"eval_generate{name}", model, tokenizer, asked[: len(asked) // few]),
            likelihoods(f"eval_loglikelihood{name}", model, tokenizer, arc[: len(arc) // few]),
        ]
    report(table, path)


def rows(file: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a published file."""
    if not (DATA / file).is_file():
        raise SystemExit(f"{DATA / file}: no such file; docs/real.md says how to assemble the folder")
    with gzip.open(DATA / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines)]


def random_llama(texts: Sequence[str]) -> tuple[Any, PreTrainedTokenizerFast]:
    """The model and its tokenizer, which is trained on the texts."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", END]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=special, show_progress=False,
                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, pad_token="<pad>", eos_token=END)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def published() -> tuple[Any, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct. BATON_SMOLLM2 is a folder where its file is, or is kept."""
    folder = Path(os.environ.get("BATON_SMOLLM2", tempfile.gettempdir()))
    file = fetch(folder)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model, tokenizer


def harness(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The harness's HF backend with this model."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH)


def answers(name: str, model: Any, tokenizer: PreTrainedTokenizerFast, asked: Sequence[str]) -> Row:
    """The row for generated answers."""
    from lm_eval.api.instance import Instance

    lm, encoder = harness(model, tokenizer), Encoder(tokenizer)
    keys: dict[str, Any] = {"until": UNTIL, "max_gen_toks": NEW, "do_sample": False, "temperature": 0.0}
    requests = [Instance("generate_until", {}, (text, dict(keys)), i) for i, text in enumerate(asked)]
    spec = SamplingSpec.of(encoder, NEW, temperature=0.0)
    said: dict[str, list[str]] = {}

    def ours() -> float:
        started = time.perf_counter()
        ids = [row[:-1] for row in encoder.documents(asked)]
        done = generate(model, ids, spec, [(i,) for i in range(len(ids))], 0, BATCH)
        texts = [str(tokenizer.decode(one.ids, skip_special_tokens=True)) for one in done]
        said["ours"] = [cut(text) for text in texts]
        return len(asked) / (time.perf_counter() - started)

    def peer() -> float:
        started = time.perf_counter()
        said["peer"] = lm.generate_until(requests, disable_tqdm=True)
        return len(asked) / (time.perf_counter() - started)

    row = in_turns(name, "answers/s", ours, peer)
    same = sum(a == b for a, b in zip(said["ours"], said["peer"], strict=True))
    print(f"{name}: {same} of {len(asked)} answers are equal", flush=True)
    return row


def cut(text: str) -> str:
    """The text before the first of the stops."""
    return text[: min((place for stop in UNTIL if (place := text.find(stop)) >= 0), default=len(text))]


def likelihoods(
    name: str, model: Any, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[str, Sequence[str]]]
) -> Row:
    """The row for the likelihoods of choices."""
    from lm_eval.api.instance import Instance

    lm, encoder = harness(model, tokenizer), Encoder(tokenizer)
    flat = [(before, f" {option}") for before, options in asked for option in options]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(flat)]
    found: dict[str, list[float]] = {}

    def ours() -> float:
        started = time.perf_counter()
        pairs = [choices.encode(encoder, before, options) for before, options in asked]
        found["ours"] = [value for row in trees.of_choices(model, encoder, pairs, BATCH) for value in row]
        return len(flat) / (time.perf_counter() - started)

    def peer() -> float:
        started = time.perf_counter()
        found["peer"] = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        return len(flat) / (time.perf_counter() - started)

    row = in_turns(name, "choices/s", ours, peer)
    off = max(abs(a - b) for a, b in zip(found["ours"], found["peer"], strict=True))
    print(f"{name}: the largest difference of a log-likelihood is {off:.1e} nats", flush=True)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--smollm2", action="store_true", help="also with SmolLM2-135M-Instruct")
    options = parser.parse_args()
    main(options.json, smollm2=options.smollm2)
