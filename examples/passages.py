"""What the examples of retrieval have in common: passages of documents, an answer, and the command line."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LENGTH = 600
"""Characters of a passage, unless a paragraph is longer."""


@dataclass(frozen=True)
class Answer:
    """The text, and the files that it was found in."""

    text: str
    sources: list[str]


def passages(folder: Path) -> Iterator[tuple[str, str]]:
    """(file's name, text): paragraphs in their order, together as far as `LENGTH` goes."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".md")):
        held = ""
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            if held and len(held) + len(paragraph) > LENGTH:
                yield path.name, held
                held = ""
            held = f"{held}\n\n{paragraph.strip()}".strip()
        if held:
            yield path.name, held


def command(doc: str, answer: Callable[[str, str, Path, str], Answer]) -> None:
    """The command line. `answer`: is given the server's address, the model, the documents and the question."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--documents", type=Path, required=True, help="a folder of .txt and .md files")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="sft")
    given = parser.parse_args()
    found = answer(given.base_url, given.model, given.documents, given.question)
    print(f"{found.text}\n\nfrom {', '.join(found.sources)}")
