"""The section of a recipe that the policy-gradient stage reads: PPO, GRPO, RLOO and REINFORCE++ by `advantage`."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from data.config import SourceConfig
from reward.config import RewardConfig, check_rewards
from rollout.config import VLLMConfig
from stages.ppo.charts import CHARTS, SECTION
from training.config import (
    CHANGED,
    REHEARSED_ANSWER,
    REHEARSED_STEPS,
    AdapterConfig,
    OptimizerConfig,
    QuantizationArguments,
    StageConfig,
    TrainedModelArguments,
    adapted,
    adapter_note,
)
from training.declaration import Declaration, HeldModel
from training.strict import Strict
from training.work import Batch, Rollout, Work

DECLARATION = Declaration(
    "policy gradient",
    targets=("ppo", "grpo", "rloo"),
    compared=("objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"),
    answers="aligned",
    headline=(("objective/scores", "score"), ("objective/kl", "nats of KL")),
    charts=CHARTS,
    section=SECTION,
    methods={"grpo": "grpo", "rlhf": "ppo"},
    learns="prompts",
    missing="no PPO curves",
)


def _refuse_unread(config: BaseModel, keys: Iterable[str], condition: str) -> None:
    """Raises ValueError if the recipe gives a key that the stage would not read."""
    for key in keys:
        if key in config.model_fields_set:
            raise ValueError(f"`{key}` is not read unless {condition}")


class AdvantageArguments(Strict):
    """How an answer's reward becomes advantages. Which of these keys are read depends on the section's `advantage`."""

    num_generations: int = Field(default=1, ge=1)
    """G, number of answers to one prompt in one iteration; at least 2 for `group` and `leave_one_out`."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """γ, discount per token, for `gae` and `global_baseline`."""
    lam: float | Literal["length_adaptive"] = 0.95
    """λ of GAE: 1 is the Monte-Carlo return, 0 the one-step error; `length_adaptive`: 1 − 1/(lam_alpha · length)."""
    lam_alpha: float = Field(default=0.05, gt=0)
    """α of the length-adaptive λ."""
    critic_lam: float | None = Field(default=None, ge=0, le=1)
    """λ of the critic's returns, if different from that of the advantages."""
    whiten_advantages: bool = True
    """`gae` only: advantages are scaled to mean 0 and deviation 1 over the iteration."""
    scale_rewards: bool = True
    """`group` only: divide by the group's standard deviation."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Number of tokens before `max_completion_length` over which a penalty rises linearly to `overlong_penalty`; 0: no
    such penalty."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """Penalty on an answer of `max_completion_length` tokens."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Penalty on the score of an answer that did not end with a stop token."""
    mask_truncated_completions: bool = False
    """Exclude answers without a stop token from the loss."""
    dynamic_sampling_rounds: int = Field(default=0, ge=0)
    """Maximum further rounds of sampling that replace groups with equal scores by other prompts' groups."""

    @model_validator(mode="after")
    def _lam_in_range(self) -> Self:
        if isinstance(self.lam, float) and not 0 <= self.lam <= 1:
            raise ValueError(f"lam is {self.lam}; it lies between 0 and 1, or is length_adaptive")
        if self.lam != "length_adaptive":
            _refuse_unread(self, ["lam_alpha"], "lam is length_adaptive")
        if not self.overlong_buffer:
            _refuse_unread(self, ["overlong_penalty"], "overlong_buffer is above 0")
        if self.num_generations == 1 and self.dynamic_sampling_rounds:
            raise ValueError("dynamic_sampling_rounds needs groups: set num_generations to 2 or more")
        return self


class LossArguments(Strict):
    """The losses of policy and critic."""

    policy_loss: Literal["clip", "clip_higher", "dual_clip", "gspo", "cispo"] = "clip"
    """`clip`: PPO. `clip_higher`: with a separate upper range (DAPO: 0.2 and 0.28). `dual_clip`: with a bound for
    negative advantages. `gspo`: one ratio per answer (GSPO: 3e-4 and 4e-4, with `loss_normaliser: sequence`). `cispo`:
    clipped weights."""
    cliprange: float = Field(default=0.2, gt=0, lt=1)
    """ε: how far a ratio may fall below 1, and also rise above 1 unless `cliprange_high` is given."""
    cliprange_high: float | None = Field(default=None, gt=0)
    """How far a ratio may rise above 1; required for `clip_higher` and `cispo`, optional for `gspo`."""
    dual_clip: float = Field(default=3.0, gt=1)
    """c of `dual_clip`: the loss of a token with negative advantage is at most c times the absolute advantage."""
    loss_normaliser: Literal["token", "sequence", "constant"] = "token"
    """A minibatch's loss is `token`: the mean over its tokens; `sequence`: the mean of its answers' means; `constant`:
    the sum divided by (number of answers · `max_completion_length`)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss relative to the policy loss."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """How far a value may move from its old one before its loss is clipped, in units of the normalised reward."""
    importance_sampling: Literal["none", "token", "sequence"] = "none"
    """Multiply losses by the ratio of the trainer's to the engine's probability, per token or per answer. For engines
    whose probabilities differ from the trainer's, such as vLLM."""
    importance_cap: float = Field(default=2.0, gt=0)
    """Upper bound of the importance weights."""

    @model_validator(mode="after")
    def _loss_keys_read(self) -> Self:
        if self.policy_loss not in ("clip_higher", "cispo", "gspo"):
            _refuse_unread(self, ["cliprange_high"], "policy_loss is clip_higher, cispo or gspo")
        elif self.policy_loss != "gspo" and self.cliprange_high is None:
            raise ValueError(f"policy_loss {self.policy_loss} needs `cliprange_high`")
        if self.policy_loss == "cispo":
            _refuse_unread(self, ["cliprange"], "policy_loss is one of clip, clip_higher, dual_clip, gspo")
        if self.policy_loss != "dual_clip":
            _refuse_unread(self, ["dual_clip"], "policy_loss is dual_clip")
        elif self.dual_clip <= 1 + self.cliprange:
            raise ValueError(f"dual_clip {self.dual_clip} is not above 1 + cliprange {self.cliprange}")
        if self.importance_sampling == "none":
            _refuse_unread(self, ["importance_cap"], "importance_sampling is token or sequence")
        return self

    @property
    def cliprange_above(self) -> float:
        """`cliprange_high` if given, else `cliprange`."""
        return self.cliprange if self.cliprange_high is None else self.cliprange_high


class KLArguments(Strict):
    """The KL penalty towards the reference."""

    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the penalty is part of each token's reward or of the loss."""
    kl_estimator: Literal["k1", "k2", "k3", "auto"] = "auto"
    """`auto`: k1 in the reward, k3 in the loss."""
    kl_coef: float = Field(default=0.05, ge=0)
    """β, weight of the KL penalty (per nat)."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` changes β to bring the KL per answer to `kl_target`."""
    kl_target: float = Field(default=6.0, gt=0)
    """Target KL of the adaptive controller, in nats per answer."""
    kl_horizon: float = Field(default=10000.0, gt=0)
    """Horizon of the adaptive controller, in answers."""
    sync_ref_model: bool = False
    """Whether the reference is moved towards the policy at intervals."""
    ref_model_sync_steps: int = Field(default=10, ge=1)
    """Iterations between two updates of the reference."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """α of the update reference ← α·policy + (1 − α)·reference; 1: the reference becomes the policy."""

    @model_validator(mode="after")
    def _kl_keys_read(self) -> Self:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 in the loss has a gradient of mean zero: it would not hold the policy. "
                "Take k3 or k2, or kl_in: reward"
            )
        if self.kl_controller == "fixed":
            _refuse_unread(self, ["kl_target", "kl_horizon"], "kl_controller is adaptive")
        if not self.sync_ref_model:
            _refuse_unread(self, ["ref_model_sync_steps", "ref_model_mixup_alpha"], "sync_ref_model is true")
        return self

    @property
    def estimator(self) -> str:
        """The KL estimator with `auto` resolved."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k1" if self.kl_in == "reward" else "k3"


class PPOTrainConfig(AdvantageArguments, LossArguments, KLArguments, OptimizerConfig):
    """One iteration: sample `rollout_batch_size` answers, score them, then `num_ppo_epochs` passes over them."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"rollout_micro_batch_size", "save_iterations"})

    refused = dict.fromkeys(
        ("top_p", "top_k", "min_p"),
        "training samples from the whole distribution: answers drawn from a part of it would be scored under another "
        "one than theirs, and the ratios would be off from the first step (docs/rl.md); use `temperature`",
    )

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate of the policy; the default is that of DeepSeekMath's GRPO (Shao et al. 2024) and TRL's."""
    iterations: int = Field(default=50, ge=1)
    """Iterations of sampling and training."""
    rollout_batch_size: int = Field(default=64, ge=2)
    """Answers of one iteration, over all processes; a multiple of `num_generations` and of (`num_mini_batches` · number
    of processes)."""
    num_ppo_epochs: int = Field(default=2, ge=1)
    """Passes over each iteration's answers."""
    num_mini_batches: int = Field(default=2, ge=1)
    """Optimizer steps in one pass."""
    critic_learning_rate: float = Field(default=9e-6, ge=0)
    """Peak learning rate of the critic; the default is that of InstructGPT's value function (Ouyang et al. 2022) and
    OpenRLHF's."""
    critic_warmup_iterations: int = Field(default=0, ge=0)
    """Initial iterations in which only the critic learns."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Iterations over which both learning rates rise to their peak."""
    lr_decay: Literal["none", "linear"] = "linear"
    """`linear`: both learning rates fall to a tenth of their peak over the run."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. All log-probabilities are computed at this temperature too."""
    max_completion_length: int = Field(default=64, ge=1)
    """Maximum tokens of an answer."""
    rollout_micro_batch_size: int = Field(default=64, ge=1)
    """Answers decoded or scored at once by one process."""
    save_iterations: int = Field(default=0, ge=0)
    """Iterations between two saved states; 0: every tenth of the run."""
    sample_iterations: int = Field(default=10, ge=1)
    """Iterations between two evaluations on held-out prompts, which log scores and add answers to samples.jsonl."""

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `OptimizerConfig.rehearsal`: a few iterations with few and short answers, each evaluated and saved."""
        most = {
            **{"iterations": REHEARSED_STEPS, "num_ppo_epochs": 2, "num_mini_batches": 2, "num_generations": 2},
            **{"max_completion_length": REHEARSED_ANSWER, "overlong_buffer": REHEARSED_ANSWER},
            **{"rollout_micro_batch_size": 8, "warmup_iterations": 1, "critic_warmup_iterations": 1},
            "dynamic_sampling_rounds": 1,
        }
        fewer = {key: size for key, size in most.items() if vars(self)[key] > size}
        often = {"save_iterations": 1, "sample_iterations": 1}
        return {**super().rehearsal(processes), **fewer, **often, "rollout_batch_size": 4 * processes}

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for key, size in (("num_mini_batches", self.num_mini_batches), ("num_generations", self.num_generations)):
            if self.rollout_batch_size % size:
                raise ValueError(f"rollout_batch_size {self.rollout_batch_size} is not a multiple of {key} {size}")
        if self.overlong_buffer > self.max_completion_length:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} exceeds max_completion_length {self.max_completion_length}"
            )
        return self


class GuardConfig(Strict):
    """When training stops early, and which model is kept. Each stop names its cause and the remedy (exit code 3)."""

    probe_prompts: int = Field(default=16, ge=0)
    """Number of prompts in a probe before training, which checks that answers end and that their rewards differ. Each
    prompt is answered `num_generations` times, at least four times; 0: no probe."""
    max_truncated: float = Field(default=0.5, ge=0, le=1)
    """Maximum share of the probe's answers that reach `max_completion_length`."""
    max_without_signal: float = Field(default=0.9, ge=0, le=1)
    """Maximum share of the probe's prompts whose answers all have the same score."""
    kl_limit: float = Field(default=50.0, gt=0)
    """KL in nats per answer above which the stage stops, because the policy is too far from the reference."""
    mismatch_limit: float | None = Field(default=None, gt=0)
    """The stage stops when the log-probabilities of engine and trainer differ by more than this on average, in nats per
    token. By default 0.05, or 0.15 where forward passes run in bfloat16."""
    entropy_floor: float = Field(default=0.05, ge=0, lt=1)
    """The stage stops when the answers' entropy falls below this share of its value in the first iteration."""
    patience: int = Field(default=10, ge=1)
    """The stage stops after this many consecutive iterations in which all rewards are equal, no answer has a stop
    token, or the critic predicts worse than a constant."""
    on_overoptimization: Literal["stop", "rollback", "warn"] = "stop"
    """What to do when the held-out score rises and the monitor falls. `stop`: end with the best model. `rollback`:
    continue from the best model with half the learning rate and twice the KL coefficient. `warn`: print a warning."""
    overoptimization_looks: int = Field(default=2, ge=1)
    """Consecutive evaluations that must show over-optimisation."""
    max_rollbacks: int = Field(default=2, ge=1)
    """Maximum number of rollbacks; at the next over-optimisation the stage stops."""
    keep: Literal["best", "last"] = "best"
    """`best`: the evaluated policy with the highest held-out monitor, or without a monitor the highest score minus
    `kl_coef` times KL. `last`: the policy at the end of training."""

    @model_validator(mode="after")
    def _guards_read(self) -> Self:
        if not self.probe_prompts:
            _refuse_unread(self, ["max_truncated", "max_without_signal"], "probe_prompts is > 0")
        if self.on_overoptimization != "rollback":
            _refuse_unread(self, ["max_rollbacks"], "on_overoptimization is rollback")
        return self


class Config(StageConfig):
    """Reinforcement learning on prompts, against rewards, from an instruction-tuned parent."""

    published: ClassVar[Sequence[str]] = (
        "objective/scores",
        "objective/kl",
        "completions/mean_length",
        "kept_iteration",
        "eval/scores",
        "eval/kl",
        "eval/mean_length",
        *CHANGED,
    )

    parent: str
    """The policy to start from; its frozen copy is the reference."""
    chat_template: str | None = None
    """Which of the parent's chat templates to use, by name, where its tokenizer has several; by default the one named
    `default`. What the stage publishes has this one."""
    advantage: Literal["gae", "group", "leave_one_out", "global_baseline"] = "gae"
    """`gae`: PPO with a critic. `group`: GRPO. `leave_one_out`: RLOO. `global_baseline`: REINFORCE++."""
    reward: list[RewardConfig] = Field(min_length=1)
    """The rewards; training maximises their weighted sum."""
    monitor: list[RewardConfig] = Field(default_factory=list)
    """Scores measured on held-out prompts and never trained on, such as a gold score, a judge or another reward model.
    Their weighted sum serves to detect over-optimisation and to choose the kept model."""
    critic: str | None = None
    """Reward model that initialises the critic; by default the first one under `reward`, or without one the policy's
    body."""
    data: list[SourceConfig] = Field(min_length=1)
    """Prompts."""
    eval_data: list[SourceConfig] = Field(default_factory=list)
    """Held-out prompts, answered every `sample_iterations` iterations."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Longer prompts are dropped and counted."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """The stage refuses to start if more than this share of the prompts was dropped."""
    vllm: VLLMConfig | None = None
    """Settings for sampling with vLLM; when absent, the in-process engine samples."""
    model_args: TrainedModelArguments = Field(default_factory=TrainedModelArguments)
    """How the weights are loaded."""
    adapter: AdapterConfig | None = None
    """Train an adapter of the policy, and one of the critic, instead of all weights. The reference is then the policy
    without its adapter, and models on the same base share its weights."""
    quantization: Literal["nf4", "int8"] | None = None
    """With an adapter: store the frozen weights of linear layers of policy and critic in four or eight bits
    (docs/adapters.md)."""
    quantization_args: QuantizationArguments = Field(default_factory=QuantizationArguments)
    """How they are stored."""
    publish_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the published weights; `auto`: that of the parent's, float32 from random weights and for an adapter
    (docs/precision.md)."""
    train: PPOTrainConfig = Field(default_factory=PPOTrainConfig)
    """The loop."""
    guards: GuardConfig = Field(default_factory=GuardConfig)
    """When training stops early, and which model is kept."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_rewards(self.reward, self.monitor)
        t = self.train
        if self.advantage in ("group", "leave_one_out") and t.num_generations < 2:
            raise ValueError(
                f"advantage {self.advantage} compares answers to one prompt: set train.num_generations to 2 or more"
            )
        if self.monitor and not self.eval_data:
            raise ValueError("`monitor` is measured at held-out prompts: name them under eval_data")
        if self.advantage != "gae":
            critic = ["critic_learning_rate", "critic_warmup_iterations", "vf_coef", "cliprange_value", "critic_lam"]
            _refuse_unread(t, [*critic, "lam", "lam_alpha", "whiten_advantages"], "advantage is gae")
            _refuse_unread(self, ["critic"], "advantage is gae")
        if self.advantage != "group":
            _refuse_unread(t, ["scale_rewards"], "advantage is group")
        if self.advantage in ("group", "leave_one_out"):
            _refuse_unread(t, ["gamma"], "advantage is gae or global_baseline")
        rates = ["learning_rate", *(["critic_learning_rate"] if self.advantage == "gae" else [])]
        if self.adapter is not None:
            self._adaptable(self.adapter)
        vars(self)["train"] = adapted(t, self.adapter, rates)
        self.frozen_weights()
        return self

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: no guard stops it, and the in-process engine samples."""
        guards = {"probe_prompts": 0, "patience": 1000, "overoptimization_looks": 1000, "keep": self.guards.keep}
        vllm = {"vllm": None} if self.vllm is not None else {}
        return {**super().rehearsal(processes), "guards": guards, **vllm}

    def _adaptable(self, adapter: AdapterConfig) -> None:
        if adapter.lora_dropout:
            raise ValueError("adapter.lora_dropout: dropout is off in this stage, so that ratios are 1 at the start")
        if self.train.sync_ref_model:
            raise ValueError("train.sync_ref_model: the reference is the policy without its adapter; it cannot move")

    @property
    def critic_parent(self) -> str | None:
        """The reward model that initialises the critic; None: the policy's body."""
        if self.critic is not None:
            return self.critic
        return next((ref for entry in self.reward for ref in entry.references), None)


def parents(config: Config) -> dict[str, str]:
    """Role -> reference. A reward model's role is `reward:` and its reference."""
    out = {"parent": config.parent}
    out |= {f"reward:{ref}": ref for entry in (*config.reward, *config.monitor) for ref in entry.references}
    if config.critic is not None:
        out["critic"] = config.critic
    return out


def models(config: Config) -> list[HeldModel]:
    """Models that the section holds in memory."""
    held = [HeldModel("policy", config.parent, trained=True, note=adapter_note(config.adapter, config.quantization))]
    if config.adapter is None:
        held.append(HeldModel("reference", config.parent, moves=config.train.sync_ref_model))
    if config.advantage == "gae":
        note = adapter_note(config.adapter, config.quantization)
        if config.critic_parent is None:
            note = ", ".join([*([note] if note else []), "the policy's body, a new head"])
        held.append(HeldModel("critic", config.critic_parent or config.parent, trained=True, note=note))
    rewards = dict.fromkeys(ref for entry in (*config.reward, *config.monitor) for ref in entry.references)
    return [*held, *(HeldModel("reward", ref) for ref in rewards)]


def work(config: Config) -> Work:
    """What the section computes at once. Every model reads each answer once, and the policy writes it."""
    t, prompt, answer = config.train, config.max_prompt_length, config.train.max_completion_length
    rows = min(t.rollout_micro_batch_size, t.rollout_batch_size)
    batch = Batch(
        min(t.per_device_train_batch_size, t.rollout_batch_size // t.num_mini_batches),
        prompt + answer,
        scored=answer,
        head="actions",
        padded=False,
    )
    sampled = Rollout(rows, prompt, answer, t.num_generations)
    return Work(
        batch,
        Batch(rows, prompt + answer, scored=answer, head="actions", padded=False),
        None if config.vllm is not None else sampled,
        batch=t.rollout_batch_size // t.num_mini_batches,
        rows=t.iterations * t.rollout_batch_size,
        passes=t.num_ppo_epochs,
        looks=1,
        states=t.save_total_limit + 1 + (config.guards.keep == "best"),
        measure_key="train.rollout_micro_batch_size",
        bf16_on_cpu=True,
        step_keys=("train.iterations",),
        checkpointed=("policy",),
    )
