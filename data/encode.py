"""The encoder: turns records into token ids and loss masks. Every stage encodes text with it.

Three rules make the tokens of training equal to those of generation, with any chat template:

1. A conversation is split into contexts and answers (data/turns.py), and each part is encoded separately. So the ids of
   a prompt are always a prefix of the ids of the answered conversation: no token spans the border, and the mask
   (exactly the answers and their stop tokens) follows from the parts without a search for tokens.
2. Answers and documents are encoded with special tokens switched off: there `<|end|>` is seven characters of text, not
   a stop token. A message with such text is refused, because in a rendered conversation it could forge a turn.
3. Only the template adds special tokens, so a beginning-of-sequence token appears once or not at all.

data/rows.py makes the rows that a stage trains on from records.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data.errors import DataError, RowRefused
from data.records import Message, Prompt
from data.template import CHAT_TEMPLATE
from data.turns import OwnTurns, Split, TemplateTurns, Turns
from handoff.encoding import tokenizer_fingerprint
from handoff.files import canonical_hash
from handoff.gate import named_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")


class Encoder:
    """Encodes and decodes with a tokenizer and its chat template. All lists of ids are plain `list[int]`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop_ids: Sequence[int] = ()) -> None:
        """The tokenizer is not changed: the encoder works on a copy of its tables.

        `stop_ids`: those that the model declares (its tokenizer record). Generation ends at these too.

        Raises:
            DataError: no pad or end token, pad equal to end, or a chat template that cannot be trained on.
        """
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            missing = "eos_token" if tokenizer.eos_token_id is None else "pad_token"
            raise DataError(
                f"{tokenizer.name_or_path}: no {missing}; name one in the tokenizer's tokenizer_config.json"
            )
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise DataError(
                f"{tokenizer.name_or_path}: pad_token and eos_token are both {tokenizer.eos_token!r}, so a model would "
                "never learn to stop; name another token of the vocabulary as pad_token in tokenizer_config.json"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        """All ids, including those of added tokens, are below it; a model has at least as many embedding rows."""
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or "(?!)")
        starts = self._backend.encode("").ids
        self._document_start = [i for i in starts if i == self.bos_id]
        self._turns: Turns | None = None
        self._header: list[int] = []
        stop: list[int] = []
        if tokenizer.chat_template is not None:
            own = tokenizer.chat_template == CHAT_TEMPLATE
            self._turns = OwnTurns() if own else TemplateTurns(self._render, self._special)
            shape = self._turns.shape
            self._header, stop = self._encode([shape.header, shape.stop], special=True)
        self.stop_ids: list[int] = list(dict.fromkeys([*stop, self.eos_id, *stop_ids]))
        """Generation ends at any of these; the first is the one that ends an answer. Rollouts, evaluation and chat
        read them here, and they are published in generation_config.json."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, pad_id: int | None = None, stop_ids: Sequence[int] = ()) -> "Encoder":
        """Loads the tokenizer in `folder`; `pad_id`, if given, replaces the tokenizer's own pad token. `stop_ids` as in
        the constructor.

        Raises DataError as the constructor does.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        with named_errors(Path(folder) / "tokenizer.json"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, mistral_format=False
            )
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise DataError(
                f"{folder}: the tokenizer has no tokenizer.json; save it once with AutoTokenizer to make one"
            )
        if pad_id is not None and tokenizer.pad_token_id != pad_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        return cls(tokenizer, stop_ids)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines a text's ids: tokenizer, chat template, special tokens, stop ids."""
        from importlib.metadata import version

        tokenizer = self.tokenizer
        return canonical_hash(
            {
                "vocabulary": tokenizer_fingerprint(json.loads(tokenizer.backend_tokenizer.to_str())),
                "template": tokenizer.chat_template,
                "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
                "ids": [self.bos_id, self.eos_id, self.pad_id, *self.stop_ids],
                "tokenizers": version("tokenizers"),
            }
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation and of the next answer's header. Raises DataError if it cannot be expressed."""
        return _or_raise(self.prompts([messages])[0])

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the conversation, and a mask that is true at the tokens of answers and at their stop tokens.

        The ids end with the last answer's stop token. Raises DataError if the template cannot express the conversation.
        """
        return _or_raise(self.chats([messages])[0])

    def answer(self, text: str) -> list[int]:
        """Ids of a completion and its stop token; `prompt(m) + answer(t)` equals `chat` of `m` answered with `t`."""
        return self.answers([text])[0]

    def document(self, text: str) -> list[int]:
        """Ids of a text and the end token, after a beginning token if the tokenizer starts texts with one."""
        return self.documents([text])[0]

    @property
    def text_part(self) -> slice:
        """The part of a `document` that is the text, without the tokens that begin and end it."""
        return slice(len(self._document_start), -1)

    @property
    def prefix_id(self) -> int:
        """The token from which a text's first token is predicted: the beginning token, or else the end token."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens and without what the template puts around an answer."""
        rest = list(ids)
        header = self._header[: len(rest)]
        if rest[: len(header)] == header:
            rest = rest[len(header) :]
        text: str = self._backend.decode(rest, skip_special_tokens=True)
        return self._turns.shape.content(text) if self._turns else text

    def prompts(self, batch: Sequence[Sequence[Message]]) -> list[list[int] | RowRefused]:
        """`prompt` for many conversations at once; the result for one that cannot be expressed is its RowRefused."""
        return [r if isinstance(r, RowRefused) else r[0] for r in self._conversations(batch, generation=True)]

    def chats(self, batch: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]] | RowRefused]:
        """`chat` for many conversations at once; the result for one that cannot be expressed is its RowRefused."""
        return self._conversations(batch, generation=False)

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """`answer` for many texts at once."""
        shape = self._require_template().shape
        return [self._closed(ids) for ids in self._encode([shape.said(text) for text in texts], special=False)]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`document` for many texts at once."""
        return [[*self._document_start, *ids, self.eos_id] for ids in self._encode(texts, special=False)]

    def refusal(self, text: str) -> RowRefused | None:
        """Why a message with this text cannot be encoded, or None."""
        found = self._special.search(text)
        return RowRefused(f"text contains the special token {found.group()}") if found else None

    def _require_template(self) -> Turns:
        if self._turns is None:
            raise DataError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template, so it can encode documents and no "
                "conversations; put a chat_template.jinja beside its tokenizer.json"
            )
        return self._turns

    def _conversations(
        self, batch: Sequence[Sequence[Message]], generation: bool
    ) -> list[tuple[list[int], list[bool]] | RowRefused]:
        splits = [self._split(messages, generation) for messages in batch]
        usable = [s for s in splits if isinstance(s, Split)]
        contexts = iter(self._encode([text for s in usable for text in s.contexts], special=True))
        answers = iter(self._encode([text for s in usable for text in s.answers], special=False))
        results: list[tuple[list[int], list[bool]] | RowRefused] = []
        for messages, split in zip(batch, splits, strict=True):
            if isinstance(split, RowRefused):
                results.append(split)
                continue
            ids: list[int] = []
            mask: list[bool] = []
            trained = [message.trained for message in messages if message.role == "assistant"]
            for turn in range(len(split.contexts)):
                context = next(contexts)
                ids += context
                mask += [False] * len(context)
                if turn < len(split.answers):
                    answer = self._closed(next(answers))
                    ids += answer
                    mask += [trained[turn]] * len(answer)
            results.append((ids, mask))
        return results

    def _split(self, messages: Sequence[Message], generation: bool) -> Split | RowRefused:
        turns = self._require_template()
        for message in messages:
            refusal = self.refusal(message.content)
            if refusal:
                return refusal
        try:
            return turns.split(messages, generation)
        except RowRefused as refusal:
            return refusal

    def _closed(self, answer: list[int]) -> list[int]:
        return [*self._header, *answer, self.stop_ids[0]]

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """`special`: whether a special token's text is encoded as that token or as ordinary text."""
        self._backend.encode_special_tokens = not special
        distinct = list(dict.fromkeys(texts))
        encoded = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(distinct, encoded, strict=True)}
        return [ids[text] for text in texts]

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise RowRefused(f"the chat template refuses it: {error}") from error
        assert isinstance(text, str)
        return text


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the policy reads it; its ids end with the header of the next answer."""

    ids: list[int]
    record: Prompt


def _or_raise(result: T | RowRefused) -> T:
    if isinstance(result, RowRefused):
        raise result
    return result
