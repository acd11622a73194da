"""A tokenizer as the vocabulary of a GGUF file: tokens, their types, merges or scores, and the names of the rules.

llama.cpp does not read a rule by which a tokenizer first cuts a text. It knows rules by name (`tokenizer.ggml.pre`,
src/llama-vocab.cpp), and a tokenizer whose rule has no name there cannot be held.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handoff.errors import HandoffError
from handoff.files import quoted

if TYPE_CHECKING:
    from data.encode import Encoder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The name under which llama.cpp has a regular expression that transformers knows by several names.
_NAMES = ("llama-bpe", "tekken", "qwen2", "qwen35", "gpt-4o")
_WHOLE_FIRST = {"llama-bpe": "dbrx"}
"""{rule that takes a word which is a token as a whole, without merging: the same expression without that}."""


@dataclass(frozen=True)
class Vocabulary:
    """What the keys `tokenizer.ggml.*` of a file say."""

    model: str
    """`gpt2`: BPE of bytes with merges; `llama`: BPE of characters with scores."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Of `gpt2` alone."""
    scores: list[float]
    """Of `llama` alone."""
    space_prefix: bool
    """Whether a space is put before a text."""
    composes: bool
    """Whether the tokenizer composes characters (NFC) before it cuts a text, which llama.cpp does not."""


def vocabulary_of(encoder: "Encoder", rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer as it was loaded, which can differ from its file: classes of transformers bring
    rules of their own.

    Args:
        encoder: the model's encoder.
        rows: the model's embeddings; ids without a token are named `[PAD<id>]`.

    Raises:
        HandoffError: GGUF has no form for such a tokenizer, or llama.cpp no name for its rules.
    """
    path = Path(encoder.tokenizer.name_or_path) / "tokenizer.json"
    content = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type", "BPE") != "BPE":
        raise HandoffError(f"{quoted(path)}: a {quoted(model['type'])} tokenizer cannot be exported to GGUF, only BPE")
    tokens, types = _tokens(content, rows)
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    normal = _steps(content.get("normalizer"), "normalizers")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if any(step["type"] == "ByteLevel" for step in steps):
        composes = _composes(path, normal)
        joined = [" ".join(merge) for merge in merges]
        pre = _rule(path, steps, whole_first=bool(model.get("ignore_merges")))
        return Vocabulary("gpt2", pre, tokens, types, joined, [], space_prefix=False, composes=composes)
    if not model.get("byte_fallback"):
        raise _nameless(path, steps)
    types = [BYTE if kind == NORMAL and _BYTE.fullmatch(text) else kind for text, kind in zip(tokens, types)]
    unknown = model.get("unk_token")
    if unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    ranks: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, place)
    scores = [float(-ranks.get(token, len(merges))) for token in tokens]
    spaced = _space_prefix(path, steps, normal)
    return Vocabulary("llama", "default", tokens, types, [], scores, space_prefix=spaced, composes=False)


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each id."""
    named = {place: text for text, place in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    tokens, types = [], []
    for place in range(rows):
        if place in added:
            tokens.append(added[place]["content"])
            types.append(CONTROL if added[place].get("special") else USER_DEFINED)
        else:
            tokens.append(named.get(place, f"[PAD{place}]"))
            types.append(NORMAL if place in named else UNUSED)
    return tokens, types


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in their order."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [found for one in step[inner] for found in _steps(one, inner)]
    return [step]


def _composes(path: Path, normal: list[Mapping[str, Any]]) -> bool:
    other = [step["type"] for step in normal if step["type"] != "NFC"]
    if other:
        raise HandoffError(
            f"{quoted(path)}: the tokenizer rewrites texts ({quoted(', '.join(other))}) before it cuts them; "
            "llama.cpp does not, and would read other tokens"
        )
    return bool(normal)


def _rule(path: Path, steps: list[Mapping[str, Any]], *, whole_first: bool) -> str:
    """llama.cpp's name of the rule by which the tokenizer first cuts a text."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        raise _nameless(path, steps)
    cuts: list[Any] = [step["type"] for step in before]
    if last.get("use_regex", True):
        if not cuts:
            return "gpt-2"
        if cuts == ["Digits"] and before[0].get("individual_digits"):
            return "smollm"
        raise _nameless(path, steps)
    if cuts != ["Split"] or before[0].get("behavior") != "Isolated" or before[0].get("invert"):
        raise _nameless(path, steps)
    expression = before[0]["pattern"].get("Regex")
    if expression == _GPT2:
        return "gpt-2"
    for name in _NAMES:
        if GGUF_PRE_TOKENIZER_SPLITS[name] == expression:
            return name if whole_first or name not in _WHOLE_FIRST else _WHOLE_FIRST[name]
    raise _nameless(path, steps)


def _space_prefix(path: Path, steps: list[Mapping[str, Any]], normal: list[Mapping[str, Any]]) -> bool:
    kinds = [step["type"] for step in normal]
    if kinds == ["Prepend", "Replace"] and not steps:
        return True
    if kinds == ["Replace"] and [step["type"] for step in steps] in ([], ["Split"]):
        return False
    if not kinds and [step["type"] for step in steps] == ["Metaspace"]:
        return bool(steps[0].get("prepend_scheme", "always") != "never")
    raise _nameless(path, [*normal, *steps])


def _nameless(path: Path, steps: list[Mapping[str, Any]]) -> HandoffError:
    told = quoted(json.dumps(steps, ensure_ascii=False))[:300]
    return HandoffError(
        f"{quoted(path)}: llama.cpp has no rule that cuts texts as this tokenizer does ({told}), and would read other "
        "tokens; export it to hf, vllm or onnx"
    )
