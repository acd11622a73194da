"""A text file as documents for pretraining.

A book is too long to be one document: held-out splits and limits would have no grain, and the end token would be met
once in a hundred thousand. So running text is cut at paragraph borders into documents of about `TARGET` characters, and
a file that has one article on each line (long lines, no blank ones) is taken line by line. The text itself is kept:
joined again with a blank line, the documents are the file.
"""

import re
from collections.abc import Iterator

TARGET = 8000
"""Characters of a document of running text: about 2,000 tokens, a few pages."""
ARTICLE_LINE = 1000
"""A file whose lines are on average this long, in characters, has one article a line."""

# Project Gutenberg wraps every book in its own words, between two such lines.
_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$", re.MULTILINE)


def split_documents(text: str) -> Iterator[str]:
    """The documents of one text file, without the wrapping of Project Gutenberg and with plain line ends."""
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
    """Paragraphs with the line breaks inside them; one that is far too long is given line by line, then in pieces."""
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
