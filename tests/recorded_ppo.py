"""Runs PPO on the completions that another run sampled: python -m tests.recorded_ppo RECORD RECIPE [key=value ...]

Engines round differently in the last digit. A random number within that difference makes one engine sample another
token, and from then on two runs cannot be compared. With this program an engine trains on recorded completions. It
still samples its own and writes to RECORD.<rank>.json how many of them equal the recorded ones.
"""

import json
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rollout.sampling import Completion
from stages.ppo.generation import Generator

Key = tuple[int | str, ...]


def recorded(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes every generator append its completions to the record `path`."""
    complete = Generator.complete

    def recording(self: Generator, actor: Any, contexts: Sequence[list[int]], keys: Sequence[Key]) -> Any:
        found = complete(self, actor, contexts, keys)
        with path.open("a", encoding="utf-8") as file:
            for context, key, c in zip(contexts, keys, found, strict=True):
                file.write(json.dumps([[*key], context, c.ids, c.logprobs, c.end]) + "\n")
        return found

    patch.setattr(Generator, "complete", recording)


def replayed(path: Path, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Makes every generator return the recorded completions. Returns counts that are updated as it does so."""
    record = defaultdict(deque)  # held-out prompts are answered repeatedly with the same key
    for line in path.read_text(encoding="utf-8").splitlines():
        key, context, *answer = json.loads(line)
        record[tuple(key)].append((context, Completion(*answer)))
    complete, counts = Generator.complete, {"completions": 0, "same": 0}

    def replaying(self: Generator, actor: Any, contexts: Sequence[list[int]], keys: Sequence[Key]) -> Any:
        own, found = complete(self, actor, contexts, keys), [record[tuple(key)].popleft() for key in keys]
        assert [context for context, _ in found] == list(contexts)
        counts["completions"] += len(own)
        counts["same"] += sum(a.ids == b.ids for a, (_, b) in zip(own, found, strict=True))
        return [completion for _, completion in found]

    patch.setattr(Generator, "complete", replaying)
    return counts


if __name__ == "__main__":
    from training.engines.launch import rank
    from training.run import main

    record = Path(sys.argv[1])
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = replayed(record, monkeypatch)
        main("ppo", sys.argv[2:])
    record.with_suffix(f".{rank()}.json").write_text(json.dumps(found), encoding="utf-8")
