"""Trains a byte-level BPE, which can encode any text and decodes it to the same bytes.

    python -m stages.tokenizer recipes/tiny.yaml

The same texts give the same file. The special tokens have the first ids (data/template.py). Some of them are reserved,
so that later training can use new markers without resizing the model.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from data.config import SourceConfig, WorldSource
from data.records import Chat, Prompt, Record, Text
from data.rows import Rows, Texts
from data.template import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, STOP_TOKENS
from stages.tokenizer.config import Config
from training.run import Run

_BATCH = 1000


def train(run: Run) -> None:
    """Runs the stage. Only the main process trains; the others wait for it."""
    config: Config = run.config
    rows = read_texts(run, config.data, "data")
    heldout = read_texts(run, config.eval_data, "held-out data", rows)

    started = time.perf_counter()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(run, rows, config),
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
        "train_bytes_per_token": bytes_per_token(tokenizer, islice(batches(rows), 1)),
        "time/train": round(elapsed, 2),
    }
    if heldout:
        metrics["eval_bytes_per_token"] = bytes_per_token(tokenizer, batches(heldout))
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


def wanted(source: SourceConfig) -> type[Text] | type[Chat] | type[Prompt]:
    """The record type as which the rows of a source are read."""
    if isinstance(source, WorldSource):
        return {"documents": Text, "chats": Chat, "preferences": Chat, "prompts": Prompt}[source.kind]
    if source.format == "auto":
        return Text if ".txt" in source.model_dump().get("path", "") else Chat
    return Text if source.format == "text" else Chat


def read_texts(
    run: Run,
    sources: Sequence[SourceConfig],
    label: str,
    apart_from: Mapping[type[Record], Rows[list[str]]] | None = None,
) -> dict[type[Record], Rows[list[str]]]:
    """Texts of documents and messages, by type of record, in the order of the sources. `apart_from`: the training
    texts, if these are held out."""
    kinds = [(kind, [source for source in sources if wanted(source) is kind]) for kind in (Text, Chat, Prompt)]
    return {
        kind: run.rows(
            chosen, Texts(kind), label=f"{label} ({kind.__name__.lower()})", apart_from=(apart_from or {}).get(kind)
        )
        for kind, chosen in kinds
        if chosen
    }


def batches(rows: Mapping[type[Record], Rows[list[str]]]) -> Iterator[list[str]]:
    """All texts, read a batch at a time."""
    texts = (text for part in rows.values() for row in part for text in row)
    while batch := list(islice(texts, _BATCH)):
        yield batch


def train_bpe(run: Run, rows: Mapping[type[Record], Rows[list[str]]], config: Config) -> Tokenizer:
    """The BPE that the main process trains, on every process."""
    tokenizer = Tokenizer(models.BPE())
    parts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] * config.split_digits
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    total = sum(int(part.lengths.sum()) for part in rows.values())

    def trained() -> str:
        with run.progress(total, "tokenizer") as advance:

            def counted() -> Iterator[list[str]]:
                for batch in batches(rows):
                    yield batch
                    advance(len(batch))

            tokenizer.train_from_iterator(counted(), trainer, length=total)
        return tokenizer.to_str()

    return Tokenizer.from_str(run.engine.on_main(trained))


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, parts: Iterable[list[str]]) -> float:
    """Mean number of UTF-8 bytes per token, over all texts of all parts."""
    size = tokens = 0
    for texts in parts:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        size += sum(len(text.encode()) for text in texts)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return size / max(1, tokens)
