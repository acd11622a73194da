"""The encoder: turns records into token ids and loss masks. Every stage encodes text with it.

Three rules make the tokens of training equal to those of generation and to transformers' own, with any chat template:

1. A conversation is rendered whole and cut into tokens at once, as `apply_chat_template` does it. Where the answers are
   in the text is known from its structure (data/turns.py), and the tokens' offsets carry that over to the mask, which
   is exactly the answers and their stop tokens.
2. A message with the text of a special token is refused, because in a rendered conversation it could forge a turn. A
   document may have it: documents are encoded with special tokens switched off, so there `<|end|>` is seven characters
   of text.
3. Only the template adds special tokens, so a beginning-of-sequence token appears once or not at all.

data/rows.py makes the rows that a stage trains on from records.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from data.calls import OF_RESULTS, held
from data.columns import lost
from data.errors import DataError, RowRefused
from data.records import Message, Prompt
from data.rendering import Renderer
from data.template import CHAT_TEMPLATE
from data.turns import Chatted, EarlierTurns, OwnTurns, Rendered, TemplateTurns, Turns
from handoff.encoding import named_template, tokenizer_fingerprint
from handoff.files import canonical_hash
from handoff.gate import named_errors
from handoff.manifest import TokenizerRecord

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
M = TypeVar("M")
Encoded: TypeAlias = tuple[list[int], list[bool]]
"""Ids, and a mask that is true at the tokens of answers and at their stop tokens."""


class Encoder:
    """Encodes and decodes with a tokenizer and its chat template. All lists of ids are plain `list[int]`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", stop_ids: Sequence[int] = ()) -> None:
        """The tokenizer is not changed: the encoder works on a copy of its tables.

        `stop_ids`: those that the model declares (its tokenizer record). Generation ends at these too.

        Raises:
            DataError: no end token, or a chat template that cannot be trained on.
        """
        from tokenizers import Tokenizer
        from tokenizers.processors import Sequence as Sequential

        self.tokenizer = tokenizer
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{tokenizer.name_or_path}: no eos_token; name one in the tokenizer's tokenizer_config.json"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        """Fills rows up. Masks and lengths say what is padding, never this id, so it may be the end token's."""
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        """All ids, including those of added tokens, are below it; a model has at least as many embedding rows."""
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or "(?!)")
        starts = self._backend.encode("").ids
        self._document_start = [i for i in starts if i == self.bos_id]
        # Some post-processors cut spaces off the tokens' offsets. They add special tokens, too, but none to what is
        # encoded here.
        self._backend.post_processor = Sequential([])
        self.lacks = "" if tokenizer.chat_template is not None else "the tokenizer has no chat template"
        """Why conversations cannot be encoded; empty if they can."""
        self._turns: Turns | None = None
        self._renderer: Renderer | None = None
        self._header: list[int] = []
        stop: list[int] = []
        if tokenizer.chat_template is not None:
            self._turns = self._learn(tokenizer.chat_template)
            self._header, stop = (self._ids(text) for text in (self._turns.shape.header, self._turns.shape.stop))
        self.stop_ids: list[int] = list(dict.fromkeys([*stop, self.eos_id, *stop_ids]))
        """Generation ends at any of these; the first is the one that ends an answer. Rollouts, evaluation and chat
        read them here, and they are published in generation_config.json."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        record: TokenizerRecord | None = None,
        chat_template: str | None = None,
    ) -> "Encoder":
        """Loads the tokenizer in `folder`.

        Args:
            folder: its directory.
            record: its tokenizer record, whose end and pad tokens and stop ids are used where the tokenizer itself
                names others, or none.
            chat_template: which of the tokenizer's chat templates is used, where it has several; by default the one
                named `default`.

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
        if record is not None and tokenizer.eos_token_id != record.eos_id:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(record.eos_id)
        if record is not None and tokenizer.pad_token_id != record.pad_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(record.pad_id)
        several = sorted(tokenizer.chat_template) if isinstance(tokenizer.chat_template, dict) else []
        if chat_template is not None:
            tokenizer.chat_template = named_template(Path(folder), chat_template)
        elif several:
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        made = cls(tokenizer, () if record is None else record.stop_ids)
        if several and made.lacks:
            made.lacks = f"the tokenizer has several chat templates ({', '.join(several)}) and none named default"
        return made

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
                "clock": self._renderer.clock() if self._renderer is not None else [],
                "tokenizers": version("tokenizers"),
            }
        )

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation and of the next answer's header. Raises DataError if it cannot be expressed."""
        return _or_raise(self.prompts([messages])[0])

    def chat(self, messages: Sequence[Message]) -> Encoded:
        """The conversation as the template renders it, and the mask.

        The ids are those of `apply_chat_template`. Raises DataError if the template cannot express the conversation.
        """
        return _or_raise(self.chats([messages])[0])[0]

    def answer(self, text: str) -> list[int]:
        """Ids of a completion and its stop token, as the model generates them after a prompt."""
        return _or_raise(self.answers([text])[0])

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

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens as they are. `special`: with that of special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=not special)
        return text

    def special_ids(self, text: str) -> list[tuple[int, int, int]]:
        """Start, end and id of each special token in the text."""
        found = list(self._special.finditer(text))
        return [(one.start(), one.end(), self._ids(one.group())[0]) for one in found]

    def without_special(self, text: str) -> str:
        """The text without that of special tokens."""
        return self._special.sub("", text)

    @property
    def ending(self) -> str:
        """What the template puts between an answer's text and its stop token."""
        return self._turns.shape.after if self._turns else ""

    def prompts(self, batch: Sequence[Sequence[Message]]) -> list[list[int] | RowRefused]:
        """`prompt` for many conversations at once; the result for one that cannot be expressed is its RowRefused."""
        turns = self._require_template()
        texts = [self._checked(messages, turns.prompt) for messages in batch]
        ids = iter(self._encode([text for text in texts if isinstance(text, str)], special=True))
        return [text if isinstance(text, RowRefused) else next(ids) for text in texts]

    def chats(
        self,
        batch: Sequence[Sequence[Message]],
        earlier: EarlierTurns = "strip",
        notes: Counter[str] | None = None,
    ) -> list[list[Encoded] | RowRefused]:
        """The rows of many conversations; the result for one that cannot be expressed is its RowRefused.

        Args:
            earlier: what becomes of answers that the template changes when later turns follow (see data/turns.py).
                With `fork`, a conversation may have several rows.
            notes: counts for the user of what was changed; added to.
        """
        turns = self._require_template()
        chats = [self._checked(messages, lambda m: turns.chat(m, earlier)) for messages in batch]
        rows = [row for chat in chats if isinstance(chat, Chatted) for row in chat.rows]
        encoded = iter(self._masked(rows))
        results: list[list[Encoded] | RowRefused] = []
        for chat in chats:
            if isinstance(chat, RowRefused):
                results.append(chat)
                continue
            results.append([next(encoded) for _ in chat.rows])
            if notes is not None:
                notes.update(chat.notes)
        return results

    def answers(self, texts: Sequence[str]) -> list[list[int] | RowRefused]:
        """`answer` for many texts at once; the result for one that cannot be expressed is its RowRefused.

        An answer is encoded behind the end of a prompt and not by itself, since some tokenizers begin a text in another
        way than they continue one. Only a text that spells a special token, which a model can do in ordinary tokens, is
        encoded by itself.
        """
        turns = self._require_template()
        answers = [self._spelled(text) if self.refusal(text) else self._rendered(text, turns.answer) for text in texts]
        encodings = iter(self._encodings([answer for answer in answers if isinstance(answer, Rendered)]))
        return [self._said(next(encodings), answer) if isinstance(answer, Rendered) else answer for answer in answers]

    def _said(self, encoding: "Encoding", answer: Rendered) -> list[int]:
        ((start, end),) = answer.answers
        first, last = _tokens(encoding, start, end)
        if encoding.offsets[first][0] < start:
            # The first token would have characters of the prompt, which the model does not generate again.
            return self._ids(self._require_template().shape.stop + answer.text[start:end])[1:]
        return encoding.ids[first : last + 1]

    def _spelled(self, text: str) -> list[int]:
        shape = self._require_template().shape
        (ids,) = self._encode([f"{shape.before}{text}{shape.after}"], special=False)
        return [*self._header, *ids, self.stop_ids[0]]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`document` for many texts at once."""
        return [[*self._document_start, *ids, self.eos_id] for ids in self._encode(texts, special=False)]

    def refusal(self, text: str) -> RowRefused | None:
        """Why a message with this text cannot be encoded, or None."""
        found = self._special.search(text)
        return RowRefused(f"text contains the special token {found.group()}") if found else None

    def check_template(self) -> None:
        """Raises DataError if the tokenizer has no chat template, or none that was chosen."""
        if self.lacks:
            raise DataError(
                f"{self.tokenizer.name_or_path}: {self.lacks}, so it can encode documents and no conversations; put "
                "a chat_template.jinja beside its tokenizer.json, or, if it has templates with names, choose one with "
                "the key chat_template of the stage that starts from it"
            )

    def _require_template(self) -> Turns:
        self.check_template()
        assert self._turns is not None
        return self._turns

    def _learn(self, template: str) -> Turns:
        if template == CHAT_TEMPLATE:
            return OwnTurns()
        self._renderer = Renderer(template, self.tokenizer.special_tokens_map)
        try:
            return TemplateTurns(self._renderer, self._special)
        except DataError as error:
            raise DataError(f"{self.tokenizer.name_or_path}: {error}") from error

    def _checked(self, messages: Sequence[Message], render: Callable[[Sequence[Message]], T]) -> T | RowRefused:
        for message in messages:
            refusal = self.refusal(message.content) or self.refusal(message.extra) or self._untaken(message)
            if refusal:
                return refusal
        return self._rendered(messages, render)

    def _untaken(self, message: Message) -> RowRefused | None:
        """Why the template would lose what a message holds besides its text, or None."""
        turns = self._require_template()
        return next((lost(key) for key in held(message) if key not in OF_RESULTS and not turns.takes(key)), None)

    def _rendered(self, given: M, render: Callable[[M], T]) -> T | RowRefused:
        try:
            return render(given)
        except RowRefused as refusal:
            return refusal

    def _masked(self, rows: Sequence[Rendered]) -> list[Encoded]:
        return [(e.ids, _mask(e, row.answers)) for e, row in zip(self._encodings(rows), rows, strict=True)]

    def _encodings(self, rows: Sequence[Rendered]) -> "list[Encoding]":
        self._backend.encode_special_tokens = False
        return self._backend.encode_batch([row.text for row in rows], add_special_tokens=False)

    def _ids(self, text: str) -> list[int]:
        return self._encode([text], special=True)[0]

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """`special`: whether a special token's text is encoded as that token or as ordinary text."""
        self._backend.encode_special_tokens = not special
        distinct = list(dict.fromkeys(texts))
        encoded = self._backend.encode_batch_fast(distinct, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(distinct, encoded, strict=True)}
        return [ids[text] for text in texts]


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the policy reads it; its ids end with the header of the next answer."""

    ids: list[int]
    record: Prompt


def _or_raise(result: T | RowRefused) -> T:
    if isinstance(result, RowRefused):
        raise result
    return result


def _mask(encoding: "Encoding", answers: Sequence[tuple[int, int]]) -> list[bool]:
    """True at the tokens of `answers`, which are places in the text."""
    mask = [False] * len(encoding)
    for start, end in answers:
        first, last = _tokens(encoding, start, end)
        mask[first : last + 1] = [True] * (last + 1 - first)
    return mask


def _tokens(encoding: "Encoding", start: int, end: int) -> tuple[int, int]:
    """The first and last token of an answer. A token with characters of the answer and of what comes before it belongs
    to the answer."""
    first = next(token for place in range(start, end) if (token := encoding.char_to_token(place)) is not None)
    last = encoding.char_to_token(end - 1)
    assert last is not None, "an answer ends with its stop token"
    # Tokens without a character of the text, such as the space that some tokenizers put first.
    while first and (chars := encoding.token_to_chars(first - 1)) is not None and chars[0] >= start:
        first -= 1
    return first, last
