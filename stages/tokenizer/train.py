"""Trains a byte-level BPE: any text can be encoded and comes back byte for byte.

    python -m stages.tokenizer recipes/tiny.yaml

The same texts give the same file. The special tokens have the first ids (data/template.py); some are reserved, so that
later training can use new markers without resizing a model.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from data.config import SourceConfig, WorldSource
from data.records import Chat, Prompt, Record, Text
from data.template import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, STOP_TOKENS
from stages.tokenizer.config import Config
from training.run import Run

_BATCH = 1000


def train(run: Run) -> None:
    """Runs the stage. It is not distributed: the main process trains, the others wait for it."""
    config: Config = run.config
    texts = read_texts(run, config.data, "data")
    heldout = read_texts(run, config.eval_data, "held-out data")

    started = time.perf_counter()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(run, texts, config),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    elapsed = time.perf_counter() - started
    metrics = {
        "vocab_size": len(tokenizer),
        "train_bytes_per_token": bytes_per_token(tokenizer, texts[:_BATCH]),
        "time/train": round(elapsed, 2),
    }
    if heldout:
        metrics["eval_bytes_per_token"] = bytes_per_token(tokenizer, heldout)
    if len(tokenizer) < config.vocab_size:
        run.console.print(
            f"  the texts give {len(tokenizer)} entries, not {config.vocab_size}: no pair is left that occurs "
            f"{config.min_frequency} times"
        )

    def write(path: Path | None) -> None:
        if path is None:
            return
        tokenizer.save_pretrained(path)
        stops = [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(path)

    run.rewind(None)
    run.log(0, metrics)
    run.publish("tokenizer", write, metrics)


def wanted(source: SourceConfig) -> type[Record]:
    """As what the rows of a source are read."""
    if isinstance(source, WorldSource):
        return {"documents": Text, "chats": Chat, "preferences": Chat, "prompts": Prompt}[source.kind]
    if source.format == "auto":
        return Text if ".txt" in source.model_dump().get("path", "") else Chat
    return Text if source.format == "text" else Chat


def read_texts(run: Run, sources: Sequence[SourceConfig], label: str) -> list[str]:
    """Texts of documents and messages, in the order of the sources."""
    texts: list[str] = []
    for kind in (Text, Chat, Prompt):
        chosen = [source for source in sources if wanted(source) is kind]
        if not chosen:
            continue
        loaded = run.load(chosen, kind)
        run.account(loaded, f"{label} ({kind.__name__.lower()})")
        for record in loaded.records:
            texts += [record.text] if isinstance(record, Text) else [message.content for message in record.messages]
    return texts


def train_bpe(run: Run, texts: Sequence[str], config: Config) -> Tokenizer:
    """The trained BPE; every process gets the main one's."""
    tokenizer = Tokenizer(models.BPE())
    parts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] * config.split_digits
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if run.is_main:
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            min_frequency=config.min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with run.progress(len(texts), "tokenizer") as advance:

            def batches() -> Iterator[Sequence[str]]:
                for start in range(0, len(texts), _BATCH):
                    yield (batch := texts[start : start + _BATCH])
                    advance(len(batch))

            tokenizer.train_from_iterator(batches(), trainer, length=len(texts))
    return Tokenizer.from_str(run.engine.from_main(tokenizer.to_str()))


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """UTF-8 bytes that a token stands for, on average."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return sum(len(text.encode()) for text in texts) / max(1, sum(len(encoding.ids) for encoding in encodings))
