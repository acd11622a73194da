"""Runs a property on random input: some of it in seconds, more in `make test`, for as long as you like by hand.

    FUZZ_SECONDS=3600 .venv/bin/python -m pytest -s tests/test_fuzz.py tests/test_data_fuzz.py -k "not fast"

gives each property an hour of ever new input, and says how many it tried. Without FUZZ_SECONDS the input is the same in
every run, and a test's result depends on no clock.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))

STRANGE = [
    *(None, True, False, -1, 0, 1, 2, 10**30, -(10**30), 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", " ", "²", "1e-4", "yes", "2026-01-01", "0x10", "null", "~", "~nobody", "..", ".", "-", "a.b", "a:b", "a b"),
    *("${HOME}/x", "$HOME", "x" * 300, "x" * 5000, "\0", "a\0b", "\ud800", "\x1b[31m", "\u202e", "é", "e\u0301", "🦆"),
    *(
        "[/bold]",
        "[red]",
        "%s",
        "{}",
        "{0}",
        "{{ x }}",
        "\n",
        "a\nb",
        "\r",
        "\t",
        "'",
        '"',
        "#",
        "a #b",
        "*",
        "&a",
        "!!",
    ),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": {"c": 1}}}),
]
"""Values that programs are known to stumble over."""

values = st.recursive(
    st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
"""Anything that JSON and YAML can hold."""


def examples(fast: int, full: int) -> pytest.MarkDecorator:
    """Parametrizes a test with `count`: few examples, and many for `make test`."""
    return pytest.mark.parametrize(
        "count", [pytest.param(fast, id="fast"), pytest.param(full, id="full", marks=pytest.mark.slow)]
    )


def fuzz(count: int, check: Callable[..., None], *strategies: st.SearchStrategy[object]) -> None:
    """Calls `check` with `count` random inputs; with FUZZ_SECONDS, again and again until they are over."""
    tried = 0

    def counted(*inputs: object) -> None:
        nonlocal tried
        tried += 1
        check(*inputs)

    profile = settings(
        max_examples=count,
        deadline=None,
        derandomize=not SECONDS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    end = time.monotonic() + SECONDS
    while True:
        profile(given(st.tuples(*strategies))(lambda inputs: counted(*inputs)))()
        if time.monotonic() >= end:
            break
    if SECONDS:
        print(f"{check.__qualname__}: {tried} inputs in {SECONDS:g} s")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}
