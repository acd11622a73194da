"""Splits a text file into documents for pretraining.

A book is too long for one document: held-out splits and limits would be too coarse, and the end token would occur only
once in 100,000 tokens. So running text is split at paragraph borders into documents of about `TARGET` characters. In a
file with one article per line (long lines, no blank ones), each line is a document. No text is lost: the documents,
joined with blank lines, are the file.
"""

import re
from collections.abc import Iterator

TARGET = 8000
"""Target length in characters of a document of running text: about 2,000 tokens, a few pages."""
ARTICLE_LINE = 1000
"""Average line length, in characters, from which a file is taken to have one article per line."""

# Project Gutenberg puts its own text before and after every book, separated by these two lines.
_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)


def split_documents(text: str) -> Iterator[str]:
    """The documents of one text file, without Project Gutenberg's own text and with plain line ends."""
    text = _unwrap(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return iter(())
    blank = text.strip("\n").count("\n") + 1 - len(lines)
    if blank * 10 < len(lines) and sum(map(len, lines)) >= ARTICLE_LINE * len(lines):
        return iter(lines)
    return _grouped(_paragraphs(text))


def _unwrap(text: str) -> str:
    start, end = _START.search(text), _END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def _paragraphs(text: str) -> Iterator[str]:
    """Yields paragraphs with their inner line breaks; a paragraph that is far too long by lines, then in pieces."""
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        if len(paragraph) <= 2 * TARGET:
            yield paragraph
            continue
        for line in paragraph.split("\n"):
            yield from (line[i : i + TARGET] for i in range(0, max(len(line), 1), TARGET))


def _grouped(paragraphs: Iterator[str]) -> Iterator[str]:
    group: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if group and size + len(paragraph) > TARGET:
            yield "\n\n".join(group)
            group, size = [], 0
        group.append(paragraph)
        size += len(paragraph) + 2
    if any(paragraph.strip() for paragraph in group):
        yield "\n\n".join(group)
