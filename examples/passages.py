"""Passages of documents, as the examples of retrieval read them."""

from collections.abc import Iterator
from pathlib import Path

LENGTH = 600
"""Characters of a passage, unless a paragraph is longer."""


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
