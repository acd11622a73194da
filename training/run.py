"""Runs a stage: from a recipe's section to a published directory.

    python -m stages.sft recipes/tiny.yaml train.learning_rate=1e-4
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.sft recipes/tiny.yaml

A stage's `train(run)` gets a `Run`, which holds its typed configuration, opens and checks its parents, counts its data,
and writes its files. With several processes, each one has a `Run`; only the main process writes.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data.config import StageSource
from data.errors import DataError
from data.fingerprint import fingerprints
from data.overlap import MOST_SHARED, check_held_out
from data.rendering import CLOCK
from data.shards import RowStore
from handoff.errors import GateError, HandoffError, UserError
from handoff.files import disk_is_full
from handoff.journal import Journal
from handoff.manifest import MODEL_KINDS, AdapterRecord, Inputs, Kind, Manifest, TokenizerRecord
from handoff.parent import Dataset, Parent, known_hashes, open_dataset, open_parent
from handoff.refused import Verdict
from handoff.stage import StageDir
from training import engines
from training.config import OptimizerConfig, Tracker
from training.engines import elastic
from training.engines.launch import check_environment, is_main, say_error
from training.engines.lost import PeersLost, peers_lost
from training.engines.protocol import Engine
from training.gates import judged
from training.importing import quick_imports, quiet_libraries
from training.inputs import present_soft_parents, stage_inputs
from training.recipe import DATA_ROLE, Recipe, RecipeError, load_recipe
from training.references import check_gates, check_models
from training.registry import Registry
from training.signals import Signals, Stopped
from training.terminal import Screen, prepare, shown
from training.trackers import check_trackers

if TYPE_CHECKING:
    from data.config import SourceConfig
    from data.encode import Encoder
    from data.rows import Kind as RowKind
    from data.rows import Rows
    from training.model import Model
    from training.publishing import Written

T = TypeVar("T")
ROWS = ".rows"
"""Folder of encoded rows in an output_root, shared by its runs."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "baton-align")


class Run:
    """One section of a recipe while its stage runs. `run_section` makes it, not the stage."""

    tries_longest = False
    """Whether a training with a Trainer begins with its longest rows, to see what it takes."""

    def __init__(self, recipe: Recipe, name: str, signals: Signals, engine: Engine) -> None:
        self.recipe = recipe
        self.section = recipe.sections[name]
        self.config: Any = self.section.config  # the stage's own Config; each train.py names the type
        self.seed = recipe.seed
        self.dir = StageDir(recipe.run_dir / name)
        self.engine = engine
        self.is_main = engine.is_main
        train = getattr(self.config, "train", None)
        if isinstance(train, OptimizerConfig):
            engine.wait_at_most(train.ddp_timeout)
        self.console = Screen(quiet=not self.is_main)
        self.resumable = False
        self.signals = signals
        self._started = time.time()
        self._parents: dict[str, Parent] = {}
        self._tokenizer: TokenizerRecord | None = None
        self._datasets: dict[str, Dataset] = {}
        self._data: dict[str, Any] = {}
        self._sha256 = known_hashes(recipe.run_dir).sha256
        self._store = RowStore(recipe.output_root / ROWS, self._sha256, engine.on_main)
        self._metrics, self._samples = Journal(self.dir.metrics_path), Journal(self.dir.samples_path)
        self._mirror: Any = None
        self._on_close: list[Callable[[], None]] = []

    def check_batch(self) -> None:
        """Checks, before any data is read, that the processes can share a training batch; says what each one takes.

        Raises:
            LaunchError: the batch is not a multiple of the number of processes.
        """
        train = self.config.optimizer_steps()
        if train is None:
            return
        rows, asked = self.engine.micro_batch(train), train.per_device_train_batch_size
        if rows < asked:
            self.console.print(
                f"  train.per_device_train_batch_size is {rows} here, not {asked}: the largest number that divides "
                f"each process's share of train.global_batch_size, {train.global_batch_size // self.engine.data_world}",
            )

    def begin(self, inputs: Inputs) -> None:
        """Locks the stage's directory, and stops the clock of chat templates at the time of its first start.

        Afterwards `resumable` says whether an earlier start had the same inputs.
        """
        self._inputs = inputs
        origin = {"recipe": str(self.recipe.path.absolute()), "overrides": list(self.recipe.overrides)}
        earlier = self.dir.started_inputs()
        self.resumable = self.engine.on_main(lambda: self.dir.begin(inputs, origin=origin))
        if (aside := self.dir.set_aside()) is not None:
            changed = "no record" if earlier is None else f"changed: {', '.join(inputs.changed(earlier))}"
            self.console.print(f"  begins anew ({changed}); the result of the earlier start is kept in {aside}")
        CLOCK.freeze(self.engine.on_main(self.dir.begun))

    # ---- what comes in

    def parent(self, role: str = "parent") -> Parent:
        """Opens that role's parent. The main process hashes its files and checks its contract. Raises HandoffError.

        A role that was opened before is returned as it was then.
        """
        if role in self._parents:
            return self._parents[role]
        ref, kinds = self.section.parents[role], Registry().declaration(self.section.stage).kinds(role)
        template = self.section.resolved.get("chat_template") if role == "parent" else None
        opened = self.engine.on_main(lambda: open_parent(ref, self.recipe.run_dir, kinds, chat_template=template))
        self._parents[role] = opened
        return opened

    def present_parents(self) -> dict[str, Parent]:
        """Opens the published soft parents (the models that an evaluation compares), in the recipe's order."""
        names = present_soft_parents(self.recipe, self.section)
        opened = self.engine.on_main(
            lambda: {name: open_parent(name, self.recipe.run_dir, MODEL_KINDS) for name in names}
        )
        self._parents |= opened
        return opened

    def rows(
        self,
        sources: Sequence["SourceConfig"],
        kind: "RowKind[T]",
        encoder: "Encoder | None" = None,
        label: str | None = "data",
        max_drop_fraction: float = 1.0,
        apart_from: "Rows[T] | None" = None,
        most_shared: float = MOST_SHARED,
    ) -> "Rows[T]":
        """The rows of the sources, encoded once and stored under output_root. Every process calls it.

        Prints how many rows were used and dropped, and keeps the counts for the manifest under `label`. With label
        None it does neither, for rows that are counted elsewhere.

        Args:
            apart_from: the training rows, if these are held out.
            most_shared: the largest share of these that may also be training rows.

        Raises:
            DataError: a source cannot be read, more than `max_drop_fraction` of its rows was dropped, or none is left;
                a source has changed since the stage began; or too many held-out rows are also training rows.
        """
        rows = self._store.open(self._located(sources), kind, encoder, self.recipe.data_root, self.seed)
        self.engine.on_main(lambda: self._check_unchanged(sources))
        self._data.setdefault("fingerprints", {}).update(rows.fingerprints)
        if label is not None:
            self.account(label, rows, max_drop_fraction)
        if apart_from is not None:
            note = self.engine.on_main(lambda: check_held_out(apart_from, rows, most_shared, self.section.name))
            if note:
                self.console.print(f"  {note}")
        return rows

    def account(self, label: str, rows: "Rows[T]", max_drop_fraction: float) -> None:
        """Prints how many rows were used and dropped, and keeps the counts for the manifest under `label`.

        Raises:
            DataError: more than `max_drop_fraction` of the rows was dropped, or none is left.
        """
        self.console.print(f"  {label}: {rows.accounting.summary()}")
        rows.accounting.check(max_drop_fraction)
        self._data[label] = rows.accounting.metrics()

    def _check_unchanged(self, sources: Sequence["SourceConfig"]) -> None:
        """Raises DataError if a source has changed since the stage began. Its rows would be taken for the old ones."""
        own = [source for source in sources if not isinstance(source, StageSource)]
        for name, digest in fingerprints(own, self.recipe.data_root, self._sha256).items():
            if digest not in self._inputs.data.values():
                self._store.discard()
                raise DataError(f"{name}: has changed since the stage began; run the same command again")

    def _located(self, sources: Sequence["SourceConfig"]) -> "list[SourceConfig]":
        """The sources. Those that are rows of a stage get that stage's folder and become parents in the manifest."""
        located: list[SourceConfig] = []
        for source in sources:
            if isinstance(source, StageSource):
                name = source.name
                rows = self.engine.on_main(partial(open_dataset, name, self.recipe.run_dir, self.section.name))
                self._datasets[f"{DATA_ROLE}{name}"] = rows
                source = source.at(rows.data_dir)
            located.append(source)
        return located

    # ---- what goes out

    def rehearse(self, kind: Kind, model: "Model") -> None:
        """Publishes the model without weights, checks the result, and removes it. Every process calls it before
        training, so that nothing is trained that could not be published.

        Raises:
            HandoffError: it cannot be published; the message names the file to mend.
        """
        expected = self._parents["parent"].tokenizer
        self._tokenizer = self.engine.on_main(lambda: self.dir.rehearse(model.rehearse, kind, expected))

    def rewind(self, step: int | None, seals: Mapping[str, Any] | None = None) -> None:
        """Removes the lines after `step` from metrics.jsonl and samples.jsonl (None: all lines).

        `seals`: what the method `seals` returned at `step`. Lines of the same step that were logged after that, by
        the evaluation and the publication at the end, are removed too. A file that was damaged since is named in the
        log.
        """
        if not self.is_main:
            return
        for journal in (self._metrics, self._samples):
            seal = None if seals is None else seals[journal.path.name]
            journal.cut(step, seal)
            if seal is not None:
                journal.end_at(seal)

    def seals(self) -> dict[str, Any]:
        """{file: its seal} of metrics.jsonl and samples.jsonl, for `rewind`."""
        return {journal.path.name: journal.seal() for journal in (self._metrics, self._samples)}

    def sync(self) -> None:
        """Writes all logged lines to the disk; called before a state is committed.

        Raises:
            OSError: the disk is full.
        """
        for journal in (self._metrics, self._samples):
            journal.sync()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl. Keys of measured times begin with `time/`."""
        if not self.is_main:
            return
        self._metrics.append([{"step": step, **metrics}])
        if self._mirror is not None:
            self._mirror.wake()

    def mirror(self, trackers: Sequence[Tracker]) -> None:
        """Mirrors the lines to these trackers from now on; says where each one's lines go, or why nowhere."""
        if self.is_main and trackers:
            from training.trackers.mirror import start_mirrors

            name = f"{self.recipe.name}/{self.section.name}"
            self._mirror = start_mirrors(trackers, self.dir, name, self.section.resolved, self.console.print)

    def samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Adds lines to samples.jsonl: prompt, completion, score, and other values that the stage wants to show."""
        if self.is_main:
            self._samples.append([{"step": step, **row} for row in rows])

    def publish(
        self,
        kind: Kind,
        write: "Callable[[Path | None], Written | None] | None",
        metrics: dict[str, Any],
        extra: dict[str, Any] | None = None,
        files: Sequence[str] = (),
        step: int = 0,
        adapter: AdapterRecord | None = None,
        verdicts: Sequence[Verdict] = (),
        advice: str = "",
    ) -> None:
        """Publishes the stage. Every process calls it.

        Args:
            kind: kind of the published result.
            write: writes the model (`Model.write`) or the rows into a directory. Every process calls it; those that do
                not write pass None.
            metrics: metrics for the manifest.
            extra: values that children need besides the weights.
            files: names of other files to publish, which were written to `StageDir.made`.
            step: step of the logged line with the share of changed weights.
            adapter: base and stack of the model, if it is published as an adapter (`Model.adapter_record`).
            verdicts: conditions of the section's gate besides those on its metrics.
            advice: what helps where they are not met.

        Raises:
            GateError: the result does not pass the gate.
        """
        metrics = {**metrics, "time/total": round(time.time() - self._started, 2)}

        def written(path: Path) -> dict[str, str]:
            assert write is not None
            done = write(path)
            if done is None:
                return {}
            if found := done.metrics():
                metrics.update(found)
                self.log(step, found)
                self.sync()
            return done.hashes

        refusal = ""
        if self.is_main:
            try:
                self.sync()
            except OSError as error:
                if disk_is_full(error):
                    raise
                raise HandoffError(
                    f"{error.filename}: cannot be written ({error.strerror}), nothing was published; mend that and run "
                    "the same command again"
                ) from error
            publish = partial(
                self.dir.publish,
                None if write is None else written,
                files=list(files),
                name=self.section.name,
                stage=self.section.stage,
                kind=kind,
                parents={
                    **{role: parent.record() for role, parent in self._parents.items()},
                    **{role: rows.record() for role, rows in self._datasets.items()},
                },
                inputs=self._inputs,
                recipe=self.section.resolved,
                data=self._data,
                seed=self.seed,
                engine=self.engine.record(),
                versions={package: version(package) for package in _PACKAGES},
                metrics=metrics,
                extra=extra or {},
                tokenizer=self._tokenizer,
                adapter=adapter,
                judge=lambda: [*verdicts, *judged(self.config.gate, metrics)],
                advice=advice,
            )
            try:
                self._announce(publish())
            except GateError as error:
                refusal = str(error)
        elif write is not None:
            write(None)
        if refusal := self.engine.on_main(lambda: refusal):
            raise GateError(refusal)
        self.engine.barrier()

    def _announce(self, manifest: Manifest) -> None:
        shown = {k: v for k, v in manifest.metrics.items() if isinstance(v, int | float) and not k.startswith("time/")}
        text = "  ".join(f"{key} {value:.4g}" for key, value in list(shown.items())[:6])
        self.console.print(f"  published {self.dir.path}  {text}")

    @contextmanager
    def progress(self, total: int, description: str) -> Iterator[Callable[[int], None]]:
        """Yields `advance(n)`; how far the stage is can be seen in its terminal and with `baton top`."""
        from training.progress import Pulse, progress, progress_path

        path = progress_path(self.recipe.run_dir, self.section.name)
        pulse = Pulse(path, total, self.engine.peak) if self.is_main else None
        with progress(self.console, total, description, pulse) as advance:
            yield advance

    def refuse(self) -> None:
        """Called after a user's mistake. If the stage has written nothing yet, its newly encoded rows are removed."""
        if self.is_main and self.dir.untouched:
            self._store.discard()

    def on_close(self, call: Callable[[], None]) -> None:
        """Registers a function that is called when the stage ends, also after a failure."""
        self._on_close.append(call)

    def close(self) -> None:
        """Calls the functions given to `on_close`, then closes the mirrors and unlocks the stage's directory."""
        for call in self._on_close:
            call()
        CLOCK.freeze(None)
        if self._mirror is not None:
            self._mirror.close()
        if self.is_main:
            self.dir.close()


def run_section(recipe: Recipe, name: str, make: Callable[[Recipe, str, Signals, Engine], Run] = Run) -> None:
    """Runs one section in this process. `make` makes the Run; `baton replay` passes a subclass that ends early.

    Raises, besides the stage's own errors:
        HandoffError: the disk is too full for a file that the stage needs. A full disk only postpones a saved state.
        Stopped: a signal ended the stage.
    """
    with Signals(name, speaks=is_main()) as signals:
        with quick_imports():
            engine = engines.start()
        try:
            _run_section(recipe, name, signals, engine, make)
        finally:
            engine.shutdown(sys.exc_info()[1])


def _run_section(
    recipe: Recipe,
    name: str,
    signals: Signals,
    engine: Engine,
    make: Callable[[Recipe, str, Signals, Engine], Run],
) -> None:
    quiet_libraries()
    section = recipe.sections[name]
    run = make(recipe, name, signals, engine)
    together = False
    try:
        run.check_batch()
        check_trackers(recipe, [name])
        check_gates(recipe, [name])
        engine.on_main(lambda: check_models(recipe, [name], fetch=True))
        run.begin(engine.on_main(lambda: stage_inputs(recipe, name)))
        with quick_imports():
            train = importlib.import_module(f"stages.{section.stage}.train").train
        train(run)
    except UserError:
        run.refuse()
        raise
    except Exception as error:
        if (lost := peers_lost(error)) is not None:
            raise lost from error
        if not disk_is_full(error):
            raise
        raise HandoffError(
            f"{run.dir.path}: the disk is full ({error}), nothing was published; free some space and run the same "
            "command again, it goes on from the last saved state"
        ) from error
    except Stopped as stopped:
        together = stopped.together
        raise
    finally:
        run.close()
        if together:
            engine.barrier()  # when the first process has ended, a launcher kills the others


def choose_section(recipe: Recipe, stage: str) -> str:
    """The section that `python -m stages.<stage>` runs. Raises RecipeError if none or several are possible."""
    candidates = [s.name for s in recipe.sections.values() if s.stage == stage]
    if stage in candidates:
        return stage
    if len(candidates) != 1:
        raise RecipeError(
            f"{recipe.path}: {'no section runs' if not candidates else 'several sections run'} the stage `{stage}`"
            + (f" ({', '.join(candidates)}); choose one with --section" if candidates else "")
        )
    return candidates[0]


def main(stage: str, arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m stages.<stage>`. Exits with 0, 2 (a user's mistake), 3 (a result below a gate of the
    recipe, or a training that the stage itself stopped) or 128 + n (ended by signal n)."""
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}", description=f"Runs the stage {stage}.")
    parser.add_argument("recipe", help="the recipe file")
    parser.add_argument("overrides", nargs="*", help="key=value, of the section or dotted from the top of the recipe")
    parser.add_argument("--section", help="which section, where several run this stage")
    options = parser.parse_intermixed_args(arguments)
    prepare()
    try:
        elastic.begin()
        check_environment()
        path, name = Path(options.recipe), options.section
        if name is None:
            name = choose_section(load_recipe(path), stage)
        recipe = load_recipe(path, options.overrides, section=name)
        if name not in recipe.sections:
            raise RecipeError(f"{path}: no section `{name}`; there are {', '.join(recipe.sections)}")
        run_section(recipe, name)
    except UserError as error:
        kind = "" if isinstance(error, RecipeError | HandoffError) else f"{type(error).__name__}: "
        if not error.said:
            say_error(shown(f"{kind}{error}"))
        elastic.end(2)
    except GateError as error:
        say_error(shown(str(error)))
        elastic.end(3)
    except Stopped as stopped:
        elastic.end(stopped.code, for_good=stopped.together)
    except PeersLost as lost:
        print(shown(f"{name}: {lost}"), file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:  # before the stage installed its signal handlers
        sys.exit(130)
