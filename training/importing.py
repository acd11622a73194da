"""How the large libraries are loaded: faster, and without their progress bars. No torch at module level."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("bitsandbytes", "wandb")
"""Packages that peft and trl import wherever they are installed, for features that Baton does not use: the choice of
layers by their condition (`peft.helpers`), and a link in a model card. Whoever needs them imports them later."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, imports take two thirds of their time.

    What they make stays until the process ends, so it is not searched for garbage, neither while it is made nor later.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python refuses to import it
    known, collecting = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        for name in hidden:
            del sys.modules[name]
        if collecting:
            gc.enable()


def quiet_libraries() -> None:
    """Turns off the libraries' progress bars, which add nothing to `Run.progress`; their warnings stay on."""
    with quick_imports():
        import datasets
        from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
