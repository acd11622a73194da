"""Removes what a run can do without: earlier results that a changed recipe has set aside, results that did not pass
their gate, and what the next start makes again from the data and from GGUF files. Imports no torch."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from handoff.files import remove_tree, tree_bytes
from handoff.lock import LOCK_NAME, RunLock
from handoff.manifest import read_manifest
from handoff.parent import UNPACKED
from handoff.previous import PREVIOUS
from handoff.refused import FAILED
from training.run import ROWS


def clean(run_dir: Path) -> list[tuple[Path, int]]:
    """Removes the folders, and returns each with its size in bytes.

    Encoded rows and unpacked models belong to all runs under the same output_root, so none of these may be running.
    An unpacked model that a published stage started from stays, because `baton verify` hashes it again.

    Raises:
        HandoffError: a stage is running; the message names its process.
    """
    root = run_dir.absolute().parent
    with ExitStack() as locks:
        for lock in sorted((*root.glob(f"*/{LOCK_NAME}"), *root.glob(f"*/*/{LOCK_NAME}"))):
            locks.enter_context(RunLock(lock.parent, "baton clean"))
        removed = [(path, tree_bytes(path)) for path in _removable(run_dir.absolute(), root)]
        for path, _ in removed:
            remove_tree(path)
    return removed


def _removable(run_dir: Path, root: Path) -> Iterator[Path]:
    for path in (run_dir / PREVIOUS, run_dir / FAILED, root / ROWS):
        if path.is_dir():
            yield path
    manifests = (read_manifest(path) for path in root.glob("*/*/stage.json"))
    used = {parent.path for manifest in manifests if manifest is not None for parent in manifest.parents.values()}
    for path in sorted((root / UNPACKED).glob("*")):
        if str(path) not in used:
            yield path
