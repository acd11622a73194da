"""Keyed randomness instead of a stream: a draw depends only on its key.

With a stream of random numbers, the draws change with the number of processes, the split of a batch, or a resume. Here
every draw has a key that says what it is for, e.g. `(seed, "ppo", step, prompt)`. The bits come from Philox, a
counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), seeded with the sha256 of
the key; they are the same on every platform.
"""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Key = str | int


def _raw(count: int, seed: int, key: tuple[Key, ...]) -> "NDArray[np.uint64]":
    """`count` independent 64-bit words for this key."""
    from numpy.random import Philox

    name = json.dumps([seed, *key], ensure_ascii=True).encode()
    digest = hashlib.sha256(name).digest()
    words: NDArray[np.uint64] = Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return words


def shuffled(n: int, seed: int, *key: Key) -> "NDArray[np.int64]":
    """A permutation of `range(n)`, shape (n,), that depends only on `n`, `seed` and `key`."""
    import numpy as np

    return np.argsort(_raw(n, seed, key), kind="stable").astype(np.int64)


def uniform(shape: int | tuple[int, ...], seed: int, *key: Key) -> "NDArray[np.float64]":
    """Numbers in [0, 1) of the given shape, float64 with 53 random bits, that depend only on the arguments."""
    import numpy as np

    sizes = (shape,) if isinstance(shape, int) else shape
    words = _raw(int(np.prod(sizes, dtype=np.int64)), seed, key)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(sizes)
