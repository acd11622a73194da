"""A judge's replies on disk, so that a question that was paid for is never asked again.

One SQLite file, `<directory>/judge.sqlite`, keyed by the hash of the whole request, model included. Each answer is its
own durable transaction, so a kill loses at most the questions in flight. Several threads and processes may use the file
at once. The base URL is not part of the key, so a served model may move to another host and port. Use another directory
if the same name comes to mean a different model.
"""

import sqlite3
import threading
from pathlib import Path
from typing import Any

from reward.functions import RewardError
from reward.judge_client import Reply

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL, refusal TEXT NOT NULL,
    input_tokens INTEGER, output_tokens INTEGER
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tokens_by_model ON replies (model, input_tokens, output_tokens);
"""


class Cache:
    """Open for the length of one call of the judge."""

    def __init__(self, directory: Path) -> None:
        """Raises RewardError when the directory cannot be created or its file is not a cache of this version."""
        self.path = directory / "judge.sqlite"
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=60.0, check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise RewardError(f"judge: cannot use `cache_dir` {directory} ({error}); name a writable one") from error
        try:
            (version,) = self._file.execute("PRAGMA user_version").fetchone()
            if version == 0:  # a new file; two processes may both run this safely
                self._file.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"its version is {version}, not {_VERSION}")
        except sqlite3.Error as error:
            self._file.close()
            raise self._unusable(error) from error

    def get(self, key: str) -> Reply | None:
        """The answer to a question, if there is one."""
        rows = self._run("SELECT text, finish, refusal, input_tokens, output_tokens FROM replies WHERE key = ?", (key,))
        if not rows:
            return None
        text, finish, refusal, read, written = rows[0]
        return Reply(text, finish, refusal, None if read is None else (read, written))

    def put(self, key: str, model: str, reply: Reply) -> Reply:
        """Stores a reply, unless another process has stored one meanwhile; returns the stored reply."""
        values = (key, model, reply.text, reply.finish, reply.refusal, *(reply.tokens or (None, None)))
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        kept = self.get(key)
        assert kept is not None
        return kept

    def tokens(self, model: str) -> tuple[int, int]:
        """Input and output tokens of all replies of a model, from any process."""
        query = "SELECT COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0) FROM replies WHERE model = ?"
        ((read, written),) = self._run(query, (model,))
        return read, written

    def close(self) -> None:
        self._file.close()

    def _run(self, statement: str, values: tuple[str | int | None, ...]) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._file.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def _unusable(self, error: sqlite3.Error) -> RewardError:
        return RewardError(
            f"judge: the cache {self.path} cannot be used ({error}); "
            "free disk space, or move the file away to start a new cache"
        )
