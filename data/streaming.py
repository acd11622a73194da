"""The text of an answer while its tokens arrive: never half a character, and nothing from a stop string on.

A character may have several tokens, a tokenizer may write a token differently after another one, and what has been
shown cannot be taken back. So text is given out once no later token can change it.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from data.encode import Encoder

Form: TypeAlias = Literal["answer", "text", "tokens"]
_HIDDEN = "�"  # bytes of a character whose rest has not been sampled yet
_WHOLE = 48  # up to this many tokens, the answer is decoded as a whole, since it may begin with the template's own text
_OVERLAP = 8  # tokens that are decoded again so that the next one is written as it is after them


class Streamed:
    """One answer's text.

    >>> class Letters:
    ...     ending = ""
    ...     def decode(self, ids): return "".join(map(chr, ids))
    ...     def text(self, ids, special): return self.decode(ids)
    >>> said = Streamed(Letters(), stops=["STOP"])
    >>> [said.add(ord(c)) for c in "aSTb"]
    ['a', '', '', 'STb']
    >>> [said.add(ord(c)) for c in "STOP"], said.stopped
    (['', '', '', ''], True)
    """

    def __init__(
        self, encoder: Encoder, stops: Sequence[str] = (), *, form: Form = "answer", trimmed: bool = False
    ) -> None:
        """
        Args:
            encoder: that of the model.
            stops: the answer ends before the first of these texts.
            form: `answer`: without special tokens and what the template puts around an answer; `text`: without special
                tokens; `tokens`: with them.
            trimmed: without the spaces at its beginning.
        """
        self._encoder, self._stops, self._form, self._trimmed = encoder, list(stops), form, trimmed
        self._first: Callable[[Sequence[int]], str] = encoder.decode if form == "answer" else self._text
        self._ending = encoder.ending if form == "answer" else ""
        self._kept = [*stops, *([self._ending] if self._ending else [])]
        self._ids: list[int] = []
        self._begun = 0  # tokens before this one are not decoded again
        self._decoded = ""  # text of all tokens, but for half characters at the end
        self.text = ""
        """What has been given out."""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now."""
        self._ids.append(token)
        self._decode()
        return self._give(self._certain())

    def finish(self) -> str:
        """The rest of the text, at the end of the answer."""
        if self.stopped:
            return ""
        self._decode(last=True)
        return self._give(self._cut(self._so_far().removesuffix(self._ending)))

    def _so_far(self) -> str:
        return self._decoded.lstrip() if self._trimmed else self._decoded

    def _text(self, ids: Sequence[int]) -> str:
        return self._encoder.text(ids, special=self._form == "tokens")

    def _decode(self, last: bool = False) -> None:
        if len(self._ids) <= _WHOLE:
            now = self._first(self._ids)
            if last or not now.endswith(_HIDDEN):
                self._decoded, self._begun = now, len(self._ids)
            return
        start = max(self._begun - _OVERLAP, 0)
        before, now = self._text(self._ids[start : self._begun]), self._text(self._ids[start:])
        if last or not now.endswith(_HIDDEN):
            self._decoded += now[len(before) :]
            self._begun = len(self._ids)

    def _cut(self, text: str) -> str:
        """The text before the first stop string."""
        found = [place for stop in self._stops if (place := text.find(stop, max(len(self.text) - len(stop), 0))) >= 0]
        if not found:
            return text
        self.stopped = True
        return text[: min(found)]

    def _certain(self) -> str:
        text = self._cut(self._so_far())
        if self.stopped:
            return text
        kept = 0
        for end in self._kept:
            most = min(len(end), len(text))
            kept = max(kept, next((n for n in range(most, 0, -1) if text.endswith(end[:n])), 0))
        return text[: len(text) - kept]

    def _give(self, text: str) -> str:
        piece, self.text = text[len(self.text) :], max(self.text, text, key=len)
        return piece
