"""The section of a recipe that the pretraining stage reads."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from data.config import SourceConfig
from training.config import (
    CHANGED,
    AdapterConfig,
    MuonTrainConfig,
    QuantizationArguments,
    StageConfig,
    TrainedModelArguments,
    adapted,
    adapter_note,
)
from training.declaration import BITS_PER_BYTE, LOSS, TOKEN_ACCURACY, TRAINER_LINE, Declaration, HeldModel
from training.work import Batch, Work

DECLARATION = Declaration(
    "pretraining",
    targets=("pretrain",),
    starts_from=frozenset({"tokenizer", "causal_lm"}),
    compared=TRAINER_LINE,
    headline=(("eval_bits_per_byte", "bits per held-out byte"), ("eval_loss", "held-out loss")),
    charts=(LOSS, BITS_PER_BYTE, TOKEN_ACCURACY),
)


class PretrainTrainConfig(MuonTrainConfig):
    """The training of the pretraining stage."""

    learning_rate: float = Field(default=3e-4, ge=0)
    """Peak learning rate. From random weights, the default is that of Llama 3 8B and OLMo 2 7B; without `model`, a
    checkpoint is trained further, and it is a tenth of that."""


class Config(StageConfig):
    """Next-token prediction on documents, from random weights or from a checkpoint."""

    published: ClassVar[Sequence[str]] = (
        "parameters",
        "train_tokens",
        "eval_loss",
        "eval_perplexity",
        "eval_bits_per_byte",
        "eval_mean_token_accuracy",
        *CHANGED,
    )

    parent: str
    """A tokenizer, to start from random weights (`model` then describes the model), or a causal language model."""
    model: dict[str, Any] | None = None
    """`architecture`: a model type of transformers (llama, mistral, qwen3, gpt2, ...); every other key is a field of
    that architecture's configuration, checked against it when the stage starts."""
    embedding_std: float | None = Field(default=None, gt=0)
    """Initial standard deviation of the token embeddings; when absent, the architecture's own, about 0.02. With a value
    near 1 and an untied head, a small model learns to copy from its context several times sooner (docs/tiny.md)."""
    data: list[SourceConfig] = Field(min_length=1)
    """Documents."""
    eval_data: list[SourceConfig] = Field(default_factory=list)
    """Held-out documents, for loss, perplexity and bits per byte."""
    block_size: int = Field(default=256, ge=8)
    """Tokens in one row. Documents are concatenated, each followed by an end token, and cut into rows."""
    isolate_documents: bool = False
    """Prevent attention between the documents of a row. This makes attention slower; use it for short, unrelated
    documents."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """The stage refuses to start if more than this share of the documents was dropped."""
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
    train: PretrainTrainConfig = Field(default_factory=PretrainTrainConfig)
    """The training."""

    def network(self) -> dict[str, Any] | None:
        """The network that `model` describes, with the keys of a config.json."""
        if self.model is None:
            return None
        return {"model_type": self.model["architecture"]} | {k: v for k, v in self.model.items() if k != "architecture"}

    @model_validator(mode="after")
    def _architecture(self) -> Self:
        if self.model is not None and not isinstance(self.model.get("architecture"), str):
            raise ValueError("model: needs `architecture`, e.g. llama")
        if self.embedding_std is not None and self.model is None:
            raise ValueError("embedding_std is for random weights; without `model` the stage goes on from a checkpoint")
        if self.adapter is not None and self.model is not None:
            raise ValueError("adapter is for a model that is trained further; random weights are all trained")
        train = adapted(self.train, self.adapter)
        if self.model is None and "learning_rate" not in self.train.model_fields_set:
            train = train.model_copy(update={"learning_rate": train.learning_rate / 10})
        vars(self)["train"] = train
        self.frozen_weights()
        if self.train.optim == "muon" and self.model_args.dtype == "bfloat16":
            raise ValueError("model_args.dtype: bfloat16 weights are stepped by AdamW alone; use train.optim: adamw")
        return self

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: a tiny network, and short rows."""
        changed = {**super().rehearsal(processes), "block_size": min(self.block_size, 128)}
        if self.model is not None:
            from training.shrink import shrunk_network

            changed["model"] = shrunk_network(self.model)
        return changed


def parents(config: Config) -> dict[str, str]:
    """Role -> reference."""
    return {"parent": config.parent}


def models(config: Config) -> list[HeldModel]:
    """Models that the section holds in memory."""
    note = adapter_note(config.adapter, config.quantization)
    if config.model is not None:
        note = f"random weights, {config.model['architecture']}"
    return [HeldModel("policy", config.parent, trained=True, note=note)]


def work(config: Config) -> Work:
    """What the section computes at once."""
    t = config.train
    batch = Batch(t.per_device_train_batch_size, config.block_size, head="loss", padded=False)
    held = Batch(t.per_device_eval_batch_size, config.block_size, padded=False) if config.eval_data else None
    return Work(batch, held, countable=False, **t.amount())
