"""Configuration classes shared by the sections of a recipe. Each stage's `config.py` builds on them. No torch here."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, Field, field_validator, model_validator

from data.config import FileSource, HubSource, SourceConfig, StageSource, WorldSource
from handoff.manifest import QuantizationRecord
from reward.config import RewardConfig
from training.gates import Gate, check_measured
from training.strict import Strict

REHEARSED_STEPS = 2
"""Steps of each training in a rehearsal."""
REHEARSED_ROWS, REHEARSED_HELD_OUT = 64, 4
"""Rows that a rehearsal reads of each source of training data, and of each other source."""
REHEARSED_ANSWER = 16
"""Most tokens of an answer in a rehearsal."""
ADAPTER_RATE = 10  # Schulman et al. 2025: the best learning rate of LoRA is ten times that of full training


Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio"]
"""The trackers to which metrics.jsonl can be mirrored (training/trackers)."""


class OptimizerConfig(Strict):
    """Settings of the optimizer step under any engine, with the names of `transformers.TrainingArguments`."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "per_device_train_batch_size",
            "gradient_checkpointing",
            "save_total_limit",
            "resume",
            "max_skipped_steps",
            "grace_seconds",
            "ddp_timeout",
            "report_to",
        }
    )

    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Maximum number of sequences in one forward and backward pass of one process. Where it does not divide a process's
    share of the batch, the largest smaller number that does is taken. If the model has dropout, what it drops depends
    on this number, as on the number of processes."""
    learning_rate: float = Field(ge=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this global norm under every engine; 0: no clipping."""
    bf16: bool | Literal["auto"] = "auto"
    """Autocast in bfloat16 over float32 weights. `auto`: on GPUs that support it and, in policy-gradient training of
    models with a hidden size of at least 256, on CPUs that support it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_total_limit: int = Field(default=2, ge=1)
    """Number of saved states to keep."""
    resume: Literal["exact", "weights"] = "exact"
    """If an interrupted stage has no complete saved state: `exact` stops and names the damaged files; `weights`
    continues from the newest intact weights at their step, with new optimizer and random states if those are lost."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Consecutive optimizer steps that may be skipped (loss or gradient not finite) before the stage stops."""
    grace_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Seconds for the current step or iteration to finish after a signal to stop; after that the process exits."""
    ddp_timeout: float = Field(default=1800.0, ge=1)
    """Seconds after which a process that waits for others in training ends with an error."""
    report_to: list[Tracker] = Field(default_factory=list)
    """Also mirror metrics.jsonl to these trackers (docs/trackers.md); `none`, or one name alone, is a list, too."""

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """What is laid over `train:` in a rehearsal on so many processes (`StageConfig.rehearsal`)."""
        only_on_gpus = {"bf16": "auto"} if self.bf16 is True else {}
        quiet = {"report_to": "none"} if self.report_to else {}
        return {"per_device_train_batch_size": 1, **only_on_gpus, **quiet}

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if isinstance(given, str):
            return [] if given == "none" else [given]
        return given

    @field_validator("report_to")
    @classmethod
    def _named_once(cls, names: list[Tracker]) -> list[Tracker]:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names {twice[0]} twice")
        return names


Optimizer = TypeVar("Optimizer", bound=OptimizerConfig)
_SOURCES = (WorldSource, FileSource, HubSource, StageSource)
CHANGED = ("weights/changed*",)
"""The metric that every stage with a parent model publishes (`StageConfig.published`)."""


class TrainConfig(OptimizerConfig):
    """Settings of a whole training run, with the names of `transformers.TrainingArguments` where it has them.

    The batch size is the total over all processes, and `gradient_accumulation_steps` follows from it, so that the same
    recipe takes the same steps on one process and on sixty-four.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"per_device_eval_batch_size", "logging_steps", "eval_steps", "save_steps"}
    )

    global_batch_size: int = Field(default=32, ge=1)
    """Sequences (pairs, for preference stages) per optimizer step, over all processes and accumulation; a multiple of
    the number of processes."""
    per_device_eval_batch_size: int = Field(default=16, ge=1)
    """Sequences in one forward pass of one process in evaluation."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps, at least 1; -1: as many as `num_train_epochs` needs."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; not read when `max_steps` is given."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    """Learning-rate schedule."""
    warmup_steps: float = Field(default=0.0, ge=0)
    """Steps of linear warm-up; a value below 1 is a share of all steps."""
    decay_steps: float = Field(default=0.2, ge=0)
    """`warmup_stable_decay` only: steps of decay at the end; a value below 1 is a share of all steps."""
    torch_compile: bool | Literal["auto"] = "auto"
    """Compile the model's forward pass; `auto`: on GPUs only."""
    use_liger_kernel: bool | Literal["auto"] = "auto"
    """Liger's kernels for norms, rotary positions and feed-forward layers; `auto`: on GPUs where the package is
    installed, without `torch_compile`."""
    logging_steps: int = Field(default=10, ge=1)
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_steps: int = Field(default=0, ge=0)
    """Optimizer steps between two evaluations on held-out data; 0: only at the end."""
    save_steps: int = Field(default=0, ge=0)
    """Optimizer steps between two saved states; 0: every tenth of the run."""

    def amount(self) -> dict[str, Any]:
        """The fields of `Work` that say how much is trained."""
        stepped = self.max_steps > 0
        return {
            "batch": self.global_batch_size,
            "rows": self.max_steps * self.global_batch_size if stepped else None,
            "passes": 1.0 if stepped else self.num_train_epochs,
            "states": self.save_total_limit + 1,
            "step_keys": ("train.max_steps",),
        }

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """A few steps, each of two micro-batches, an evaluation and a saved state after each of them."""
        compiled = {"torch_compile": "auto"} if self.torch_compile is True else {}
        return {
            **super().rehearsal(processes),
            **compiled,
            "max_steps": REHEARSED_STEPS if self.max_steps < 0 else min(self.max_steps, REHEARSED_STEPS),
            "global_batch_size": 2 * processes,
            "per_device_eval_batch_size": min(self.per_device_eval_batch_size, 4),
            "logging_steps": 1,
            "save_steps": 1,
            **({"eval_steps": 1} if self.eval_steps else {}),
        }

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps 0 would train nothing: give at least 1, or -1 for `num_train_epochs`")
        return self


class MuonTrainConfig(TrainConfig):
    """Training that may use Muon for the hidden weight matrices."""

    optim: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the hidden matrices, AdamW for embeddings, head, norms and biases. Not for
    DeepSpeed or FSDP, which shard matrices."""
    muon_learning_rate: float = Field(default=0.02, ge=0)
    """Peak learning rate of the matrices under `muon`; `learning_rate` applies to the rest."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Momentum of the matrices under `muon`."""

    @model_validator(mode="after")
    def _read(self) -> Self:
        unread = sorted(self.model_fields_set & {"muon_learning_rate", "muon_momentum"})
        if self.optim != "muon" and unread:
            raise ValueError(f"{unread[0]} is not read unless optim is muon")
        return self


class ModelArguments(Strict):
    """How a stage loads weights."""

    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; `auto`: sdpa, or flash_attention_2 where the GPU and the package allow it."""


class TrainedModelArguments(ModelArguments):
    """How a stage loads the weights that it trains."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights that are trained: float32 with `auto`. `bfloat16` holds weights and AdamW's moments in
    it, with stochastic rounding: 8 bytes a parameter instead of 16; not for Muon, DeepSpeed or FSDP. With an adapter:
    precision of the frozen weights below it, with `auto` the parent's; the adapter is float32. See
    docs/precision.md."""


class AdapterConfig(Strict):
    """A LoRA adapter, with the names of `peft.LoraConfig`: the parent's weights stay as they are, and the adapter is
    trained.

    The defaults are those with which LoRA learns as well as full training (Schulman et al. 2025, "LoRA Without Regret",
    https://thinkingmachines.ai/blog/lora/): all linear layers, alpha 32 whatever the rank, and ten times the learning
    rate of full training, which is the default of `train.learning_rate` with an adapter.
    """

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
            "follows from the stage and its parent",
        ),
        "peft_version": "is written by peft",
        "fan_in_fan_out": "follows from the model's layers",
        "bias": "trained biases would change the model even with the adapter off, and the adapter off is the reference",
        "lora_bias": "layers without a bias could not be merged",
        "trainable_token_indices": "train whole embeddings with modules_to_save",
        "target_parameters": "parameters outside of linear layers, such as fused experts, stay frozen; train all",
        "ensure_weight_tying": "an embedding that is tied to the head stays frozen",
        "layer_replication": "would train another network than the parent's",
        **dict.fromkeys(
            ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
            "these initialisations change the base or read data; use init_lora_weights true or gaussian",
        ),
        **dict.fromkeys(
            ("velora_config", "kasa_config", "monteclora_config", "arrow_config", "use_bdlora", "use_qalora"),
            "only LoRA, rsLoRA and DoRA are offered",
        ),
        "qalora_group_size": "only LoRA, rsLoRA and DoRA are offered",
        "alora_invocation_tokens": "an adapter that is on for some tokens only cannot be merged",
        **dict.fromkeys(("megatron_config", "megatron_core"), "Megatron's layers are not used"),
        "runtime_config": "is not part of an adapter",
    }

    r: int = Field(default=32, ge=1)
    """Rank of the update of each weight matrix. For reinforcement learning small ranks suffice; for much supervised
    data take more."""
    lora_alpha: float = Field(default=32, gt=0)
    """α: the update is scaled by α / r, or by α / √r with `use_rslora`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what the adapter reads. Not for policy-gradient training."""
    target_modules: str | list[str] = "all-linear"
    """The layers to adapt: `all-linear` (all but the head), the ends of their names, or one regular expression for
    whole names."""
    exclude_modules: str | list[str] | None = None
    """Layers among these that are left out, named in the same way."""
    layers_to_transform: list[int] | None = None
    """Adapt only the layers of the network with these numbers, counted from 0."""
    layers_pattern: str | None = None
    """`layers_to_transform` only: name of the list of layers whose numbers are meant; by default the outermost one."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """{end of a layer's name, or regular expression: its rank}, where it differs from `r`."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """{end of a layer's name, or regular expression: its α}, where it differs from `lora_alpha`."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Ends of the names of modules that are trained as a whole, in a copy. A reward model's new head always is."""
    use_rslora: bool = False
    """Scale by α / √r, so that larger ranks learn faster (Kalajdzievski 2023)."""
    use_dora: bool = False
    """DoRA: length and direction of the weights are trained apart (Liu et al. 2024). Slower; not for DeepSpeed or
    FSDP, nor over a quantised base."""
    init_lora_weights: Literal[True, "gaussian"] = True
    """Initial values of the first of the two matrices: uniform (true), or normal. The second one begins at zero, so the
    adapter changes nothing at the start."""
    merge: bool = False
    """Publish the whole model with the adapter merged into its weights in float32, instead of the adapter."""

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern is not read unless layers_to_transform is given")
        if not self.target_modules:
            raise ValueError("target_modules names no layer")
        if any(r < 1 for r in self.rank_pattern.values()):
            raise ValueError("rank_pattern: a rank is at least 1")
        return self


class QuantizationArguments(Strict):
    """How `quantization` stores the frozen weights, with the names of `transformers.BitsAndBytesConfig`."""

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"), "write quantization: nf4, or quantization: int8"
        ),
        "bnb_4bit_compute_dtype": "follows from train.bf16: products are computed as those of other layers",
        "bnb_4bit_quant_storage": "is for engines that cut weights up; those cannot hold quantised ones here",
        "llm_int8_threshold": "activations are not quantised here, so none of them needs to be treated apart",
        "llm_int8_has_fp16_weight": "would keep the weights in 16 bits beside the quantised ones",
        "llm_int8_enable_fp32_cpu_offload": "all weights of a model are on the device of its process",
    }

    bnb_4bit_use_double_quant: bool = True
    """`nf4` only: quantise the scales of the weights, too, which saves 0.37 bits a weight (Dettmers et al. 2023)."""
    llm_int8_skip_modules: list[str] = Field(default_factory=list)
    """Ends of the names of linear layers that are not quantised."""


DORA_OVER_QUANTISED = "adapter.use_dora: DoRA measures whole weights in every step; over quantised ones take LoRA"


def quantised(
    adapter: AdapterConfig | None, method: Literal["nf4", "int8"] | None, arguments: QuantizationArguments
) -> QuantizationRecord | None:
    """What a section's `quantization` and `quantization_args` say; None if the frozen weights are not quantised.

    Raises:
        ValueError: there is no adapter, or a key would not be read.
    """
    if method is None:
        if arguments.model_fields_set:
            raise ValueError("quantization_args is not read unless quantization is given")
        return None
    if adapter is None:
        raise ValueError(
            "quantization is for frozen weights below an adapter; trained weights cannot be quantised. Add "
            "`adapter: {}`, or leave quantization out"
        )
    if adapter.use_dora:
        raise ValueError(DORA_OVER_QUANTISED)
    double = arguments.bnb_4bit_use_double_quant and method == "nf4"
    if method == "int8" and "bnb_4bit_use_double_quant" in arguments.model_fields_set:
        raise ValueError("quantization_args.bnb_4bit_use_double_quant is not read unless quantization is nf4")
    return QuantizationRecord(method=method, double_quant=double, skipped=arguments.llm_int8_skip_modules)


def adapted(train: Optimizer, adapter: AdapterConfig | None, rates: Sequence[str] = ("learning_rate",)) -> Optimizer:
    """`train` with the default learning rates for an adapter where the recipe gives none: ten times the stage's own."""
    if adapter is None:
        return train
    if isinstance(train, MuonTrainConfig) and train.optim == "muon":
        raise ValueError("train.optim: muon orthogonalises whole weight matrices, which an adapter leaves as they are")
    unset = [rate for rate in rates if rate not in train.model_fields_set]
    return train.model_copy(update={rate: ADAPTER_RATE * vars(train)[rate] for rate in unset})


def adapter_note(adapter: AdapterConfig | None, quantization: str | None = None) -> str:
    """What is said of a trained model (`HeldModel.note`): that its weights are frozen below an adapter."""
    over = "" if quantization is None else f" over {quantization}"
    return "" if adapter is None else f"an adapter of rank {adapter.r}{over}"


def _below(kind: type | tuple[type, ...], place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a kind below a value of the recipe, each with its dotted place."""
    if isinstance(value, kind):
        yield place, value
    elif isinstance(value, list | BaseModel):
        for key, inner in enumerate(value) if isinstance(value, list) else value:
            yield from _below(kind, f"{place}.{key}", inner)


def _sources(place: str, value: Any) -> Iterator[tuple[str, SourceConfig]]:
    return _below(_SOURCES, place, value)


class StageConfig(Strict):
    """Keys that every section may have."""

    publishes_rows: ClassVar[bool] = False
    """Whether the stage publishes rows (`kind: dataset`), which other sections read as data, and no model."""
    published: ClassVar[Sequence[str]] = ()
    """Names of the metrics that the stage publishes, for gates; `*` stands for any characters. Those that begin with
    `eval` are measured on `eval_data`."""

    stage: str = ""
    """The stage package that runs the section; by default the one with the section's name."""
    gate: Gate = Field(default_factory=Gate)
    """What the result must reach to be published (docs/gates.md). If it does not, it is kept aside, what was published
    before stays, and the pipeline stops with exit code 3."""

    def sources(self) -> list[SourceConfig]:
        """Every data source that the section names, under whichever key."""
        return [source for key, value in self for _, source in _sources(key, value)]

    def folders(self) -> list[str]:
        """Folders, relative to the working directory, on whose files the result depends besides its data."""
        return []

    def main_data(self) -> list[SourceConfig]:
        """The sources that the stage is about: its `data:`, without what is held out."""
        return [source for key, value in self if key == "data" for _, source in _sources(key, value)]

    def rewards(self) -> dict[str, RewardConfig]:
        """Every reward that the section names, by its place: `reward.0`."""
        return {place: entry for key, value in self for place, entry in _below(RewardConfig, key, value)}

    def compared_with_parents(self) -> list[str]:
        """Models that the section's gate compares with their parents, which the section has to name, too."""
        return []

    def vocabulary(self) -> int | None:
        """Entries of the tokenizer that the section makes; None if it makes none."""
        return None

    def network(self) -> dict[str, Any] | None:
        """The network that the section builds, with the keys of a config.json; None if it takes its parent's."""
        return None

    def trained_adapter(self) -> AdapterConfig | None:
        """The section's `adapter:`; None if all weights are trained."""
        return next((value for _, value in self if isinstance(value, AdapterConfig)), None)

    def frozen_weights(self) -> QuantizationRecord | None:
        """How `quantization` and `quantization_args` say that the weights below the section's adapter are quantised;
        None: not. Raises ValueError if these keys do not fit together."""
        if "quantization" not in type(self).model_fields:
            return None
        own: Any = self
        return quantised(own.adapter, own.quantization, own.quantization_args)

    def training(self) -> OptimizerConfig | None:
        """The section's `train:`; None if nothing is trained."""
        return next((value for _, value in self if isinstance(value, OptimizerConfig)), None)

    def loading(self) -> ModelArguments:
        """The section's `model_args:`."""
        return next((value for _, value in self if isinstance(value, ModelArguments)), ModelArguments())

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """What is laid over the section in a rehearsal on so many processes: {dotted key: value}. It makes everything
        shorter, and leaves out what needs a GPU, writes elsewhere, or demands something of the result."""
        changed: dict[str, Any] = {}
        for key, entries in self:
            most = REHEARSED_ROWS if key == "data" and self.training() is not None else REHEARSED_HELD_OUT
            changed |= {f"{place}.limit": min(most, one.limit or most) for place, one in _sources(key, entries)}
            if isinstance(entries, OptimizerConfig):
                changed |= {f"{key}.{name}": value for name, value in entries.rehearsal(processes).items()}
            if isinstance(entries, Gate) and key in self.model_fields_set:
                changed[key] = {}
            if isinstance(entries, ModelArguments) and entries.attn_implementation not in ("auto", "eager"):
                changed[f"{key}.attn_implementation"] = "auto"
        return changed

    @model_validator(mode="after")
    def _gate_is_measured(self) -> Self:
        check_measured(self.gate, self.published, held_out=bool(getattr(self, "eval_data", None)))
        return self

    def optimizer_steps(self) -> TrainConfig | None:
        """The section's `train:`, if its optimizer steps take rows of the data; otherwise None."""
        return next((value for _, value in self if isinstance(value, TrainConfig)), None)


class TrainedStageConfig(StageConfig):
    """A stage that starts from a parent and trains it on data."""

    parent: str
    """A section of this recipe, a checkpoint directory, or a model id of the hub."""
    chat_template: str | None = None
    """Which of the parent's chat templates to use, by name, where its tokenizer has several; by default the one named
    `default`. What the stage publishes has this one."""
    data: list[SourceConfig] = Field(min_length=1)
    """Training data."""
    eval_data: list[SourceConfig] = Field(default_factory=list)
    """Held-out data, for the losses and metrics that the manifest keeps."""
    max_length: int = Field(default=512, ge=8)
    """Maximum tokens in a row; `truncation` handles longer rows."""
    truncation: Literal["drop", "error", "keep_end"] = "drop"
    """For rows longer than `max_length`: `drop` drops and counts them, `error` stops and names the row, `keep_end` cuts
    their beginning."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """The stage refuses to start if more than this share of its rows was dropped, for any reason."""
    model_args: TrainedModelArguments = Field(default_factory=TrainedModelArguments)
    """How the weights are loaded."""
    adapter: AdapterConfig | None = None
    """Train an adapter instead of all weights."""
    quantization: Literal["nf4", "int8"] | None = None
    """With an adapter: store the frozen weights of linear layers in four or eight bits (docs/adapters.md)."""
    quantization_args: QuantizationArguments = Field(default_factory=QuantizationArguments)
    """How they are stored."""
    publish_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the published weights; `auto`: that of the parent's, float32 from random weights and for an adapter
    (docs/precision.md)."""
    train: TrainConfig
    """The training."""

    @model_validator(mode="after")
    def _weights_move(self) -> Self:
        vars(self)["train"] = adapted(self.train, self.adapter)
        self.frozen_weights()
        return self
