"""How the large libraries are loaded: faster, and without their progress bars. No torch at module level."""

import gc
import logging
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
    """Turns off the libraries' progress bars, which add nothing to `Run.progress`, and transformers' reports on what a
    checkpoint lacks, which `Model.load` checks; other warnings stay on."""
    with quick_imports():
        import datasets
        from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
