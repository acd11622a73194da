"""`baton plan`: what each section of a recipe takes in memory, on the disk and in time, before anything is started.

The shapes of all models follow from the recipe: from `model:` and the tokenizer's size, or from the config.json and the
headers of the weight files of the directory or hub model that a chain of sections starts from. No weights are read, and
no torch is imported. `training/cost.py` has the arithmetic.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.config import HubSource, SourceConfig, StageSource, WorldSource
from data.errors import DataError
from data.sources import read_rows
from handoff.errors import HandoffError, UserError
from handoff.files import read_json
from handoff.gguf import is_gguf, sizes
from handoff.manifest import Kind, QuantizationRecord, read_manifest
from training.config import MuonTrainConfig, StageConfig
from training.cost import Cost, Held, Settings, cost
from training.declaration import HeldModel
from training.devices import Device, gpu, this_cpu
from training.engines import engine_of
from training.engines.launch import Request
from training.engines.shares import alone, planned
from training.engines.single import micro_batch as share_of
from training.recipe import Recipe, Section, load_recipe
from training.registry import Registry
from training.shapes import Shape, shape_in, shape_of
from training.work import Work

UTILISATION = 0.4
"""Share of a GPU's peak FLOP/s that training is taken to reach."""
_COUNTED = 200_000
"""Rows of files that are counted at most; more are not worth the time."""


@dataclass(frozen=True)
class PlannedSection:
    """One section with what it costs."""

    name: str
    stage: str
    held: list[Held]
    work: Work
    settings: Settings
    cost: Cost
    request: Request
    device: Device
    rows: int | None
    measured: float | None = None
    """The peak that a probe measured, in bytes."""

    @property
    def peak(self) -> float:
        """Most bytes of one process."""
        return self.cost.peak.total

    @property
    def fits(self) -> bool:
        """Whether a process has that much memory."""
        return self.peak <= self.device.memory

    def probed(self, peak: float) -> "PlannedSection":
        """The section after a probe has measured its peak: what comes and goes is corrected so that the plan agrees."""
        largest = self.cost.peak
        factor = max(0.1, 1 + (peak - largest.total) / max(1.0, largest.passing))
        settings = replace(self.settings, correction=self.settings.correction * factor)
        return replace(self.changed(settings=settings), measured=peak)

    def changed(
        self,
        request: Request | None = None,
        settings: Settings | None = None,
        micro_batch: int | None = None,
        work: Work | None = None,
    ) -> "PlannedSection":
        """The section under another engine, with other settings, or with other batches."""
        new = replace(self, request=request or self.request, settings=settings or self.settings, work=work or self.work)
        found = cost(
            new.held,
            new.work,
            new.settings,
            new.request,
            new.device,
            micro_batch or self.cost.micro_batch,
            new.rows,
        )
        return replace(new, cost=found)


@dataclass(frozen=True)
class Plan:
    """The sections of a recipe that have models in memory."""

    recipe: Recipe
    request: Request
    device: Device
    sections: list[PlannedSection]


def plan(path: Path, overrides: Sequence[str] = (), launch: Path | None = None, device_name: str | None = None) -> Plan:
    """Plans every section.

    Args:
        path, overrides: the recipe.
        launch: an accelerate configuration; without one, one process.
        device_name: a GPU of `training.devices`; None: the CPU of this machine.

    Raises:
        UserError: a mistake in the recipe or the launch file, an unknown GPU, or a model that cannot be planned.
    """
    recipe = load_recipe(path, overrides)
    request = planned(launch, "cpu" if device_name is None else "cuda")
    if request.device == "cpu" and device_name is not None:
        raise UserError(f"--gpu {device_name}: {launch} runs on the CPU; leave one of the two out")
    if request.device == "cuda" and device_name is None:
        raise UserError(f"{launch} runs on GPUs: say which, for example --gpu h100")
    return plan_on(recipe, request, this_cpu(request.processes) if device_name is None else gpu(device_name))


def plan_on(recipe: Recipe, request: Request, device: Device) -> Plan:
    """Plans every section for an engine and what its processes run on. Raises UserError for a model that cannot be
    planned, or a batch that the processes cannot share."""
    shapes = Shapes(recipe)
    sections = [
        found for name in recipe.order() if (found := _section(recipe.sections[name], shapes, request, device, recipe))
    ]
    return Plan(recipe, request, device, sections)


def _section(
    section: Section, shapes: "Shapes", request: Request, device: Device, recipe: Recipe
) -> PlannedSection | None:
    registry = Registry()
    config: StageConfig = section.config
    models = registry.models(section.stage, config)
    if not models:
        return None
    work = registry.work(section.stage, config)
    if not registry.declaration(section.stage).distributed:
        request = alone(request)
    held = [_held(model, section, shapes, request.device, splits=engine_of(request).splits) for model in models]
    in_turn = [one for one in held if one.model.in_turn]
    if in_turn:
        largest = max(in_turn, key=lambda one: one.parameters)
        held = [one for one in held if one is largest or not one.model.in_turn]
    engine = engine_of(request)
    train = config.training()
    micro_batch, settings = 1, Settings()
    if train is not None:
        width = held[0].shape.hidden if work.bf16_on_cpu else None
        muon = isinstance(train, MuonTrainConfig) and train.optim == "muon"
        if muon:
            engine.check_optimizer(f"{section.name}.train.optim", "muon")
        steps = config.optimizer_steps()
        if steps is not None:
            micro_batch = share_of(steps.global_batch_size, steps.per_device_train_batch_size, request.processes)
        elif work.batch % request.processes:
            raise UserError(
                f"{recipe.path}: {section.name}: {work.batch} answers of a minibatch cannot be shared by "
                f"{request.processes} processes; take a train.rollout_batch_size that can"
            )
        else:
            micro_batch = min(train.per_device_train_batch_size, work.batch // request.processes)
        settings = Settings(
            bf16=engine.choose_bf16(train.bf16, device.bf16, width),
            checkpointing=train.gradient_checkpointing,
            width=2 if _in_bfloat16(section) else 4,
            published=shapes.published(section.name),
            muon=muon,
            checkpointed=work.checkpointed,
        )
    rows = work.rows
    if rows is None:
        rows = _rows(section, recipe.data_root) if work.countable else None
    found = cost(held, work, settings, request, device, micro_batch, rows)
    return PlannedSection(section.name, section.stage, held, work, settings, found, request, device, rows)


def _held(model: HeldModel, section: Section, shapes: "Shapes", device: str, *, splits: bool) -> Held:
    """A model of a section, with its adapter. Models whose adapters are on the policy's base share its weights, unless
    the engine cuts them up."""
    config: StageConfig = section.config
    shape = shapes.of(model.parent, section.name, config)
    headless = model.role in ("critic", "reward")
    adapter = config.trained_adapter()
    width = _frozen_width(model, section, shapes, splits=splits, device=device)
    if adapter is None and model.trained:
        return Held(model, shape, headless, width=width)
    trained_over = shapes.quantization(model.parent)
    if trained_over is not None or config.frozen_weights() is not None:
        width = 4
    if adapter is None:
        return Held(model, shape, headless, width=width, quantization=trained_over)
    policy = section.parents["parent"]
    asked = config.frozen_weights()
    quantization = trained_over or (asked if model.trained else None)
    if quantization is not None and splits:
        raise UserError(f"{section.name}.quantization: engines that cut weights up cannot hold quantised ones")
    if quantization is not None and shape.experts:
        raise UserError(f"{section.name}.quantization: the experts of a layer are one tensor, which stays as it is")
    beside = model.role != "policy" and len(Registry().models(section.stage, config)) > 1
    same = shapes.base(model.parent) == shapes.base(policy) and quantization == (shapes.quantization(policy) or asked)
    shared = beside and not splits and same
    if not model.trained:
        return Held(model, shape, headless, width=width, shared=shared, quantization=quantization)
    named = adapter.target_modules if isinstance(adapter.target_modules, list) else None
    return Held(model, shape, headless, shape.adapter(adapter.r, named), width, shared, quantization)


def _in_bfloat16(section: Section) -> bool:
    """Whether a section's `model_args` ask for weights in bfloat16."""
    return bool(section.resolved["model_args"].get("dtype") == "bfloat16")


def _frozen_width(model: HeldModel, section: Section, shapes: "Shapes", *, splits: bool, device: str) -> int:
    """Bytes of a number of a model's frozen weights, or of those below its adapter."""
    if model.trained and section.resolved["model_args"].get("dtype") != "auto":
        return 2 if _in_bfloat16(section) else 4
    if model.role == "reference" and _in_bfloat16(section):
        return 2
    converts = splits if model.trained else device == "cpu"
    if model.moves or (model.role == "policy" and converts):
        return 4
    return shapes.stored(model.parent, splits=splits)


class Shapes:
    """The shapes of the models that the sections of a recipe load."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._known: dict[str, Shape] = {}

    def of(self, ref: str, section: str, config: StageConfig) -> Shape:
        """The shape of the model `ref`, which `section` loads; or of the one that it builds from the tokenizer `ref`.

        Raises:
            UserError: there is no such model here, or none that can be planned.
        """
        network = config.network()
        if network is not None:
            keys = network | {"vocab_size": self._vocabulary(ref)}
            return shape_of(keys, place=f"{self._recipe.path}: {section}.model")
        if ref not in self._known:
            self._known[ref] = self._find(ref)
        return self._known[ref]

    def base(self, ref: str) -> str:
        """What a model's adapters lie on: the nearest of its ancestors that publishes whole weights."""
        while ref in self._recipe.sections:
            section = self._recipe.sections[ref]
            adapter = section.config.trained_adapter()
            if adapter is None or adapter.merge or "parent" not in section.parents:
                break
            ref = section.parents["parent"]
        return ref

    def _adds(self, ref: str) -> bool:
        """Whether the adapters from a model down to its base add products of matrices and no more."""
        while ref in self._recipe.sections:
            adapter = self._recipe.sections[ref].config.trained_adapter()
            if adapter is None or adapter.merge:
                return True
            if adapter.use_dora or adapter.modules_to_save:
                return False
            ref = self._recipe.sections[ref].parents["parent"]
        return True

    def quantization(self, ref: str) -> QuantizationRecord | None:
        """How the weights below the adapter of a model are quantised, or those of its files."""
        while ref in self._recipe.sections:
            section = self._recipe.sections[ref]
            adapter = section.config.trained_adapter()
            if adapter is None or adapter.merge or "parent" not in section.parents:
                return None
            found: QuantizationRecord | None = section.config.frozen_weights()
            if found is not None:
                return found
            ref = section.parents["parent"]
        if is_gguf(ref):
            return None
        folder = model_directory(ref)
        manifest = read_manifest(folder.parent / "stage.json")
        if manifest is not None and manifest.adapter is not None:
            return manifest.adapter.quantization
        stored: dict[str, Any] = read_json(folder / "config.json", infinity=True).get("quantization_config") or {}
        if stored.get("quant_method") != "bitsandbytes":
            return None
        double = bool(stored.get("bnb_4bit_use_double_quant"))
        return QuantizationRecord(method="int8" if stored.get("load_in_8bit") else "nf4", double_quant=double)

    def stored(self, ref: str, *, splits: bool = False) -> int:
        """Bytes of a number of a model that is loaded as it is stored. An adapter stands beside its base's weights, or
        is merged into float32 ones: by an engine that cuts weights up, and where it is more than a sum."""
        if ref in self._recipe.sections:
            base = self.base(ref)
            if base == ref:
                return self.published(ref)
            return 4 if splits or not self._adds(ref) else self.stored(base)
        if is_gguf(ref):
            return 4
        config = read_json(model_directory(ref) / "config.json", infinity=True)
        return 2 if (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16") else 4

    def published(self, name: str) -> int:
        """Bytes of a number of the whole weights that a section publishes."""
        section = self._recipe.sections[name]
        asked = section.resolved.get("publish_dtype", "float32")
        if asked != "auto":
            return 4 if asked == "float32" else 2
        if section.config.network() is not None:
            return 4
        parent = section.parents["parent"]
        while self.base(parent) != parent:
            parent = self.base(parent)
        return self.stored(parent)

    def _find(self, ref: str) -> Shape:
        if ref not in self._recipe.sections:
            return model_shape(ref)
        made = self._recipe.sections[ref]
        parent = made.parents.get("parent")
        if parent is None:
            raise UserError(f"{self._recipe.path}: {ref} publishes no model, so nothing can be planned that loads it")
        return self.of(parent, ref, made.config)

    def _vocabulary(self, ref: str) -> int:
        """The number of token ids of a tokenizer."""
        if ref in self._recipe.sections:
            size = self._recipe.sections[ref].config.vocabulary()
            if size is None:
                raise UserError(f"{self._recipe.path}: {ref} makes no tokenizer")
            return int(size)
        from handoff.parent import open_parent

        kinds: set[Kind] = {"tokenizer", "causal_lm"}
        opened = open_parent(ref, self._recipe.run_dir, kinds, verify=False)
        return opened.tokenizer.vocab_size


def model_shape(ref: str) -> Shape:
    """The shape of a model that is no section: a directory, a GGUF file or a model of the hub. Raises UserError."""
    if is_gguf(ref):
        config, stored = sizes(Path(ref).expanduser())
        return shape_of(config, stored, ref)
    return shape_in(model_directory(ref))


def model_directory(ref: str) -> Path:
    """The folder with the config.json of a checkpoint directory, a published stage, or a model of the hub. Of a hub
    model that is not on this machine, config.json alone is fetched."""
    folder = Path(ref).expanduser()
    if folder.is_dir():
        return folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if ref.count("/") != 1 or ref.startswith((".", "/", "~")):
        raise HandoffError(f"{ref}: no such directory")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(ref, "config.json")).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HandoffError(
            f"{ref}: not a directory here, and its config.json cannot be fetched from the hub "
            f"({type(error).__name__}); download it where there is a network (`hf download {ref} config.json`)"
        ) from error


def _rows(section: Section, root: Path | None) -> int | None:
    """How many rows the section's training data has; None where that takes a network or too long, or the data is not
    here yet. Rows that the stage would drop are counted."""
    total = 0
    for source in section.config.main_data():
        found = _source_rows(source, root)
        if found is None:
            return None
        total += found if source.limit is None else min(found, source.limit)
    return total


def _source_rows(source: SourceConfig, root: Path | None) -> int | None:
    if isinstance(source, WorldSource):
        return source.size
    if isinstance(source, HubSource | StageSource):
        return None
    count = 0
    try:
        for _ in read_rows(source, root, Counter()):
            count += 1
            if count > _COUNTED:
                return None
    except DataError:
        return None
    part = {"all": 1.0, "train": 1 - source.holdout}.get(source.split, source.holdout / 2)
    return max(1, round(count * part))
