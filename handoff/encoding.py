"""Reads bos, eos, stop and pad ids from a directory's files, without loading its tokenizer.

The files are tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja,
generation_config.json and config.json.

When several files name an id:

- bos, eos: the tokenizer's. The model's eos (config.json) counts only where the tokenizer names none.
- stop ids: generation_config.json's eos_token_id, one or a list. Without it: eos, and the token with which the chat
  template ends a turn (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, ...) if it is a special token of the vocabulary.
- pad: the tokenizer's, unless it is missing or equal to eos, as in many published base models. Then it is
  generation_config.json's pad_token_id, or, for a foreign checkpoint without one, an unused special token: one named
  for padding, a reserved one, or the unknown token. Where there is none (GPT-2, SmolLM2), it is eos. Nothing here
  depends on it: masks and lengths say what is padding. A pad of its own is taken where there is one, since other
  programs look for the last token that is no padding.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handoff.errors import HandoffError
from handoff.files import canonical_hash, quoted, read_json
from handoff.gate import LIMITS
from handoff.manifest import TokenizerRecord

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
# In order of preference. Only special tokens count: text can never contain them.
_SPARE = (r"\W*pad\W*", r".*finetune.*pad.*", r".*(reserved|unused|control_\d|extra_).*", r".*_pad\W*", r"\W*unk\W*")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Files:
    """The parsed files of a directory; an absent file is an empty dict."""

    directory: Path
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    generation_config: dict[str, Any]
    config: dict[str, Any]
    template: str | None


def read_tokenizer(model_dir: Path, *, choose_pad: bool = False, template: str | None = None) -> TokenizerRecord:
    """The record of the tokenizer in `model_dir`.

    Args:
        choose_pad: use a spare token if pad is missing or equal to eos (foreign checkpoints).
        template: which of the tokenizer's chat templates; by default the one named `default`.

    Raises:
        HandoffError: no tokenizer.json, no eos, a named token that the vocabulary lacks, or no template of that name.
    """
    files = _read(model_dir)
    if template is not None:
        files = replace(files, template=named_template(model_dir, template))
    ids = _token_ids(files.tokenizer)
    bos_id = _special_id(files, ids, "bos_token")
    eos_id = _special_id(files, ids, "eos_token")
    if eos_id is None:
        eos_id = _first(files.config.get("eos_token_id"))
    if eos_id is None:
        raise HandoffError(
            f"{model_dir}: the tokenizer has no eos_token, so nothing can end an answer; "
            "name one in tokenizer_config.json"
        )
    stop_ids = _stop_ids(files, ids, eos_id)
    pad_id = _pad_id(files, ids, eos_id, bos_id, stop_ids, choose_pad)
    return TokenizerRecord(
        fingerprint=tokenizer_fingerprint(files.tokenizer),
        template_fingerprint=canonical_hash(
            {"template": files.template, "pad": pad_id, "eos": eos_id, "bos": bos_id, "stop": stop_ids}
        ),
        vocab_size=max(ids.values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        stop_ids=stop_ids,
    )


def tokenizer_fingerprint(tokenizer: dict[str, Any]) -> str:
    """Hash of a parsed tokenizer.json, without the truncation and padding settings that its last user left on."""
    return canonical_hash({key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")})


def token_text(model_dir: Path, token_id: int) -> str:
    """The vocabulary's text of an id."""
    ids = _token_ids(_read(model_dir).tokenizer)
    return next(text for text, known in ids.items() if known == token_id)


def declared_pad_id(model_dir: Path) -> int | None:
    """The pad that the tokenizer itself names, without regard to other files."""
    files = _read(model_dir)
    return _special_id(files, _token_ids(files.tokenizer), "pad_token")


def template_text(model_dir: Path, name: str | None = None) -> str | None:
    """The tokenizer's chat template: the one of that name, or by default the one named `default`."""
    return _read(model_dir).template if name is None else named_template(model_dir, name)


def named_template(model_dir: Path, name: str) -> str:
    """One of the tokenizer's chat templates. Raises HandoffError, with the names that there are, if there is none."""
    named = _named_templates(model_dir, _optional(model_dir / "tokenizer_config.json"))
    if name not in named:
        raise HandoffError(
            f"{model_dir} has no chat template named {name}"
            + (f"; chat_template chooses one of: {', '.join(sorted(named))}" if named else ", and none with a name")
        )
    return named[name]


def generation_stop_ids(model_dir: Path) -> list[int]:
    """eos_token_id of generation_config.json, ascending; empty when the file or the key is absent."""
    return _id_list(_optional(model_dir / "generation_config.json").get("eos_token_id"))


def _read(model_dir: Path) -> _Files:
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise HandoffError(
            f"{model_dir} has no tokenizer.json; convert its tokenizer once with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer = read_json(path, LIMITS["tokenizer.json"])
    if "vocab" not in tokenizer.get("model", {}):
        raise HandoffError(f"{path} has no model.vocab, so it is not a file of the tokenizers library")
    tokenizer_config = _optional(model_dir / "tokenizer_config.json")
    return _Files(
        directory=model_dir,
        tokenizer=tokenizer,
        tokenizer_config=tokenizer_config,
        special_tokens_map=_optional(model_dir / "special_tokens_map.json"),
        generation_config=_optional(model_dir / "generation_config.json"),
        config=_optional(model_dir / "config.json"),
        template=_template(model_dir, tokenizer_config),
    )


def _optional(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path, infinity=path.name == "config.json") if path.is_file() else {}
    return content


def _template(model_dir: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The chat template: from its own file (since transformers 4.51) or from a key (before). Of a list of named
    templates, the default."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    return _named_templates(model_dir, tokenizer_config).get("default") if isinstance(template, list) else template


def _named_templates(model_dir: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """{name: template} where a tokenizer has several: in a list (until transformers 4.51), or in files."""
    listed = tokenizer_config.get("chat_template")
    named = {entry["name"]: entry["template"] for entry in listed} if isinstance(listed, list) else {}
    own = model_dir / "chat_template.jinja"
    if own.is_file():  # transformers calls it so
        named["default"] = own.read_text(encoding="utf-8")
    for path in sorted((model_dir / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = path.read_text(encoding="utf-8")
    return named


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """{token: id} of the model's vocabulary and of the added tokens."""
    vocab = tokenizer["model"]["vocab"]
    # Unigram models list (token, score) pairs whose position is the id; all others map tokens to ids.
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    ids.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])})
    return ids


def _special_id(files: _Files, ids: dict[str, int], role: str) -> int | None:
    value = files.tokenizer_config.get(role)
    if value is None:
        value = files.special_tokens_map.get(role)
    if value is None:
        return None
    text: str = value["content"] if isinstance(value, dict) else value
    if text not in ids:
        raise HandoffError(f"{files.directory}: {role} {quoted(repr(text))} is not in the vocabulary of tokenizer.json")
    return ids[text]


def _id_list(value: Any) -> list[int]:
    """An int, a list of ints or None, as a list in ascending order."""
    if value is None:
        return []
    return sorted(set(value)) if isinstance(value, list) else [value]


def _first(value: Any) -> int | None:
    first: int | None = next(iter(value), None) if isinstance(value, list) else value
    return first


def _special_tokens(tokenizer: dict[str, Any]) -> list[tuple[int, str]]:
    return sorted(
        (token["id"], token["content"]) for token in tokenizer.get("added_tokens", []) if token.get("special")
    )


def _stop_ids(files: _Files, ids: dict[str, int], eos_id: int) -> list[int]:
    declared = _id_list(files.generation_config.get("eos_token_id"))
    if declared:
        return declared
    special = {text for _, text in _special_tokens(files.tokenizer)}
    in_template = [text for text in END_OF_TURN if text in special and text in (files.template or "")]
    return sorted({eos_id, *(ids[text] for text in in_template)})


def _pad_id(
    files: _Files, ids: dict[str, int], eos_id: int, bos_id: int | None, stop_ids: list[int], choose: bool
) -> int:
    declared = _special_id(files, ids, "pad_token")
    # generation_config.json comes second: a stage that starts from such a parent publishes its pad there.
    for pad_id in (declared, _first(files.generation_config.get("pad_token_id"))):
        if pad_id is not None and pad_id != eos_id:
            return pad_id
    fault = "no pad token" if declared is None else "the pad token is the end token"
    if choose:
        taken = {eos_id, bos_id, *stop_ids}
        spare = [
            (token_id, text)
            for token_id, text in _special_tokens(files.tokenizer)
            if token_id not in taken and text not in (files.template or "")
        ]
        for pattern in _SPARE:
            for token_id, text in spare:
                if re.fullmatch(pattern, text, re.IGNORECASE):
                    _log.warning(
                        "%s: %s; padding with its unused token %r (id %d)", files.directory, fault, text, token_id
                    )
                    return token_id
    return eos_id
