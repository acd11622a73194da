"""The section of a recipe that the SFT stage reads."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from data.turns import EarlierTurns
from training.config import CHANGED, REHEARSED_ANSWER, MuonTrainConfig, TrainedStageConfig, adapter_note
from training.declaration import LOSS, STOP_RATE, TOKEN_ACCURACY, TRAINER_LINE, Declaration, HeldModel
from training.work import Batch, Rollout, Work

DECLARATION = Declaration(
    "instruction tuning",
    targets=("sft",),
    compared=TRAINER_LINE,
    answers="tuned",
    headline=(("eval_loss", "held-out loss"), ("eval_stop_rate", "of answers stop")),
    charts=(LOSS, TOKEN_ACCURACY, STOP_RATE),
    methods={"sft": "sft", "dpo": "sft", "grpo": "sft", "rlhf": "sft"},
    learns="conversations",
    missing="no instruction tuning",
)


class SFTTrainConfig(MuonTrainConfig):
    """The training of the SFT stage."""

    learning_rate: float = Field(default=2e-5, ge=0)
    """Peak learning rate; the default is for models of 1 B parameters and more (Zephyr, OLMo 2, SmolLM3, TRL)."""


class Config(TrainedStageConfig):
    """Instruction tuning on conversations; only answers and their stop tokens enter the loss."""

    published: ClassVar[Sequence[str]] = (
        "eval_loss",
        "eval_mean_token_accuracy",
        "eval_stop_rate",
        "eval_answer_tokens",
        *CHANGED,
    )

    earlier_turns: EarlierTurns = "strip"
    """For chat templates that change an answer once later turns follow it (Qwen3 leaves its thought out, GPT-OSS ends
    it with another token). `strip`: train each conversation as the template renders it, with all answers. `keep`: with
    the answers as the model generates them, unlike the template. `fork`: as the template renders it, and once more for
    each answer that is changed, up to that answer: the most exact, with more tokens. Other templates: no difference."""
    packing: bool = False
    """Pack several conversations into one row of `max_length` tokens, without attention between them. Faster on GPUs
    with long rows; on a CPU, `group_by_length` is faster."""
    group_by_length: bool = True
    """Batch rows of similar length together, to reduce padding. Not read with `packing`."""
    eval_answers: int = Field(default=32, ge=0)
    """Number of held-out conversations whose last turn is answered greedily in each evaluation, to measure the stop
    rate; some of the answers go to samples.jsonl."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum tokens of such an answer."""
    train: SFTTrainConfig = Field(default_factory=SFTTrainConfig)
    """The training."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.packing and "group_by_length" in self.model_fields_set and self.group_by_length:
            raise ValueError("packing and group_by_length are two ways to avoid padding; choose one")
        return self

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: few, short answers."""
        answers = {
            "eval_answers": min(self.eval_answers, 2),
            "max_new_tokens": min(self.max_new_tokens, REHEARSED_ANSWER),
        }
        return {**super().rehearsal(processes), **answers}


def parents(config: Config) -> dict[str, str]:
    """Role -> reference."""
    return {"parent": config.parent}


def models(config: Config) -> list[HeldModel]:
    """Models that the section holds in memory."""
    return [HeldModel("policy", config.parent, trained=True, note=adapter_note(config.adapter, config.quantization))]


def work(config: Config) -> Work:
    """What the section computes at once."""
    t, held, answers = config.train, None, None
    padded = not config.packing
    if config.eval_data:
        held = Batch(t.per_device_eval_batch_size, config.max_length)
        if config.eval_answers:
            rows = min(t.per_device_eval_batch_size, config.eval_answers)
            answers = Rollout(rows, config.max_length, config.max_new_tokens)
    batch = Batch(t.per_device_train_batch_size, config.max_length, padded=padded)
    return Work(batch, held, answers, countable=padded, **t.amount())
