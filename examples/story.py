"""A writing session: several beginnings to choose from, then paragraph after paragraph, shown while they are written.

baton serve runs/tiny:sft
python -m examples.story "a lighthouse in winter"
"""

import argparse
from collections.abc import Iterator
from typing import Any

from openai import OpenAI

_SYSTEM = "You write stories with the user, one paragraph at a time."


class Story:
    """A story, and how it goes on. With a seed, the same choices give the same story."""

    def __init__(self, client: OpenAI, model: str, subject: str, *, seed: int = 0, length: int = 120) -> None:
        self._client, self._model, self._seed, self._length = client, model, seed, length
        self._turns: list[Any] = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"Begin a story about {subject}."},
        ]
        self.paragraphs: list[str] = []

    def beginnings(self, count: int = 3) -> list[str]:
        """Beginnings to choose from."""
        reply = self._client.chat.completions.create(
            model=self._model, messages=self._turns, n=count, temperature=0.9, top_p=0.95, seed=self._seed,
            max_tokens=self._length,
        )  # fmt: skip
        return [choice.message.content or "" for choice in reply.choices]

    def take(self, paragraph: str) -> None:
        """The paragraph becomes a part of the story."""
        self.paragraphs.append(paragraph)
        self._turns.append({"role": "assistant", "content": paragraph})

    def go_on(self, wish: str = "Go on.") -> Iterator[str]:
        """Parts of the next paragraph while it is written; at its end it belongs to the story."""
        self._turns.append({"role": "user", "content": wish})
        text = ""
        for event in self._client.chat.completions.create(
            model=self._model, messages=self._turns, temperature=0.9, top_p=0.95, stop=["\n\n"], stream=True,
            seed=self._seed + len(self.paragraphs), max_tokens=self._length,
        ):  # fmt: skip
            piece = event.choices[0].delta.content or "" if event.choices else ""
            text += piece
            yield piece
        self.take(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("subject")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="sft")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    story = Story(OpenAI(base_url=given.base_url, api_key="none"), given.model, given.subject, seed=given.seed)
    found = story.beginnings()
    for number, text in enumerate(found, 1):
        print(f"{number}: {text!r}\n")
    story.take(found[int(input(f"which one (1 to {len(found)})? ")) - 1])
    while wish := input("how does it go on (an empty line ends)? ").strip():
        for piece in story.go_on(wish):
            print(repr(piece)[1:-1], end="", flush=True)
        print()


if __name__ == "__main__":
    main()
