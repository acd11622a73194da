"""The section of a recipe that the PPO stage reads."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data.config import SourceConfig
from reward.config import RewardConfig
from stages.config import ModelArguments, OptimizerConfig, StageConfig


class PPOTrainConfig(OptimizerConfig):
    """One iteration: sample `rollout_batch_size` answers, score them, then `num_ppo_epochs` passes over them."""

    iterations: int = Field(default=50, ge=1)
    """Iterations of sampling and training."""
    rollout_batch_size: int = Field(default=64, ge=2)
    """Answers sampled in one iteration, over all processes; a multiple of `num_mini_batches` times processes."""
    num_ppo_epochs: int = Field(default=2, ge=1)
    """Passes over each iteration's answers."""
    num_mini_batches: int = Field(default=2, ge=1)
    """Optimizer steps in one pass."""
    critic_learning_rate: float = Field(default=1e-4, ge=0)
    """Peak learning rate of the critic."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Iterations over which both learning rates rise to their peak."""
    lr_decay: Literal["none", "linear"] = "linear"
    """`linear`: both learning rates fall to a tenth of their peak over the run."""
    cliprange: float = Field(default=0.2, gt=0, lt=1)
    """ε of the clipped policy loss."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """How far a value may move from its old one before its loss is clipped, in units of the normalised reward."""
    vf_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss beside the policy loss."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a token's reward."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """λ of GAE: 1 is the Monte-Carlo return, 0 the one-step error."""
    whiten_advantages: bool = True
    """Advantages are scaled to mean 0 and deviation 1 over the iteration."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty against the reference goes: k1 in each token's reward, or k3 in the loss. Never both."""
    kl_coef: float = Field(default=0.05, ge=0)
    """β, weight of the KL penalty (per nat)."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` moves β so that the KL of an answer goes to `kl_target`."""
    kl_target: float = Field(default=6.0, gt=0)
    """Nats an answer that the adaptive controller aims at."""
    kl_horizon: float = Field(default=10000.0, gt=0)
    """Answers over which the adaptive controller acts."""
    kl_limit: float = Field(default=50.0, gt=0)
    """Nats an answer above which the stage stops: the policy has left the reference."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken from the score of an answer that did not end with a stop token."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; log-probabilities are those of the tempered distribution, too."""
    max_completion_length: int = Field(default=64, ge=1)
    """Tokens of an answer, at most."""
    rollout_micro_batch_size: int = Field(default=64, ge=1)
    """Answers decoded or scored at once by one process."""
    save_iterations: int = Field(default=0, ge=0)
    """Iterations between two saved states; 0: every tenth of the run."""
    sample_iterations: int = Field(default=10, ge=1)
    """Iterations between two looks at held-out prompts: their score is logged, some answers go to samples.jsonl."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.rollout_batch_size % self.num_mini_batches:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of num_mini_batches "
                f"{self.num_mini_batches}"
            )
        return self


class Config(StageConfig):
    """PPO on prompts, against rewards, from an instruction-tuned parent."""

    parent: str
    """The policy to start from; its frozen copy is the reference."""
    reward: list[RewardConfig] = Field(min_length=1)
    """What is maximised: a weighted sum."""
    critic: str | None = None
    """The reward model that the critic starts from; by default the first one under `reward`, else the policy's body."""
    data: list[SourceConfig] = Field(min_length=1)
    """Prompts."""
    eval_data: list[SourceConfig] = Field(default_factory=list)
    """Held-out prompts, answered every `sample_iterations`."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Longer prompts are dropped and counted."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """The stage refuses to start when more than this share of the prompts was dropped."""
    model_args: ModelArguments = Field(default_factory=ModelArguments)
    """How the weights are loaded."""
    train: PPOTrainConfig = Field(default_factory=PPOTrainConfig)
    """The loop."""

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        names = [entry.name for entry in self.reward]
        if len(set(names)) != len(names):
            raise ValueError(f"two rewards of the same name: {', '.join(names)}")
        return self

    @property
    def critic_parent(self) -> str | None:
        """Where the critic comes from; None: from the policy's body."""
        if self.critic is not None:
            return self.critic
        return next((entry.model for entry in self.reward if entry.model is not None), None)


def parents(config: Config) -> dict[str, str]:
    """Role -> reference. A reward model's role is `reward:` and its reference."""
    out = {"parent": config.parent}
    out |= {f"reward:{entry.model}": entry.model for entry in config.reward if entry.model is not None}
    if config.critic is not None:
        out["critic"] = config.critic
    return out
