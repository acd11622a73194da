"""The limits of a server, and the key that its clients must show. No torch here."""

import hmac
import os
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from handoff.errors import UserError

KEY_VARIABLE = "BATON_API_KEY"
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Limits:
    """What one server does at once, and what one request may ask for."""

    batch_size: int = 16
    """Answers that are decoded at once."""
    queue: int = 64
    """Answers that may wait for a place; more are refused with 429."""
    max_n: int = 8
    """Answers that one request may ask for."""
    max_length: int = 4096
    """Tokens of a prompt and its answer together; less where the model's window is smaller."""
    max_tokens: int = 1024
    """Tokens of an answer in chat whose request names no number."""
    max_body: int = 2**20
    """Bytes of a request."""
    max_inputs: int = 256
    """Texts of one request for embeddings."""
    body_seconds: float = 30.0
    """How long a client may take to send its request."""
    drain_seconds: int = 60
    """How long running answers may take after SIGTERM."""


def need_packages() -> None:
    """Raises UserError if the server's packages are not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "llguidance") if find_spec(name) is None]
    if missing:
        raise UserError(f"baton serve needs {', '.join(missing)}: pip install 'baton-align[serve]'")


class ApiKey:
    """The key. Only its hash is kept, and two hashes are compared in constant time."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)

    def accepts(self, authorization: str | None) -> bool:
        """Whether the header `Authorization` has the key."""
        scheme, _, given = (authorization or "").partition(" ")
        return hmac.compare_digest(_digest(given.strip()), self._digest) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def read_key(file: Path | None) -> str | None:
    """The key: the first line of `file`, or else the environment variable; None if there is neither.

    Raises:
        UserError: the file cannot be read or is empty, or the variable is empty.
    """
    if file is not None:
        try:
            key = file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file}: it cannot be read ({error})") from error
        if not key:
            raise UserError(f"--api-key-file {file}: its first line is empty; write the key there")
    else:
        found = os.environ.get(KEY_VARIABLE)
        if found is None:
            return None
        key = found.strip()
        if not key:
            raise UserError(f"{KEY_VARIABLE} is set and empty; give it the key, or unset it")
    if not key.isascii() or not key.isprintable():
        raise UserError("the API key has characters that HTTP headers cannot carry; use printable ASCII")
    return key
