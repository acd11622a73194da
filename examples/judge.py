"""A judge: our own served model grades answers, in JSON that a schema guarantees.

    baton serve runs/tiny:sft
    python -m examples.judge answers.jsonl          # rows {"prompt": ..., "answer": ...}

A recipe's rewards can ask the same server (docs/judge.md).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

_ASK = "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nGrade the answer from 1, useless, to 5, right and clear."
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"grade": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["grade"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Grade:
    """A grade from 1 to 5, and the mean of the grades by their probabilities."""

    grade: int
    expected: float


def grade(client: OpenAI, model: str, prompt: str, answer: str) -> Grade:
    """Grades one answer, always in the same way."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": _ASK.format(prompt=prompt, answer=answer)}],
        response_format={"type": "json_schema", "json_schema": {"name": "grade", "strict": True, "schema": SCHEMA}},
        temperature=0, logprobs=True, top_logprobs=20, max_tokens=60,
    )  # fmt: skip
    choice = reply.choices[0]
    found = int(json.loads(choice.message.content or "")["grade"])
    assert choice.logprobs is not None and choice.logprobs.content is not None
    # How likely the model found each grade in the place where it wrote one.
    place = next(entry for entry in choice.logprobs.content if entry.token.strip() == str(found))
    weights = {token.token.strip(): 2.718281828**token.logprob for token in reversed(place.top_logprobs)}
    weights = {name: weight for name, weight in weights.items() if name in ("1", "2", "3", "4", "5")}
    weights.setdefault(str(found), 2.718281828**place.logprob)
    return Grade(found, sum(int(name) * weight for name, weight in weights.items()) / sum(weights.values()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="sft")
    given = parser.parse_args()
    client = OpenAI(base_url=given.base_url, api_key="none")
    for line in given.rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found = grade(client, given.model, row["prompt"], row["answer"])
        print(f"{found.grade}  {found.expected:.2f}  {row['answer']!r}")


if __name__ == "__main__":
    main()
