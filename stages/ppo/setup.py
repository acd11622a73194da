"""Builds the inputs of the loop: prompts, rewards, models, optimizer."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.config import SourceConfig
from data.encode import EncodedPrompt, Encoder
from data.rows import Prompts, Rows
from data.sampling import shuffled
from handoff.contract import check_same_encoding
from handoff.parent import Parent
from reward.compose import Composition
from reward.config import RewardConfig
from reward.learned import LearnedReward, statistics
from rollout import ragged
from stages.ppo.actor_critic import ActorCritic, Critic
from stages.ppo.config import Config, PPOTrainConfig
from training.engines.protocol import Engine
from training.limits import within_window
from training.model import Model, WithoutAdapter
from training.optimizer import adamw, decay_groups, decayed_names, in_bfloat16
from training.recipe import RecipeError
from training.rewards import load_rewards, readable, token_readers
from training.run import Run
from training.shared import SharedBase


def check_batch(run: Run, t: PPOTrainConfig) -> None:
    """Raises RecipeError when the processes cannot share a minibatch evenly."""
    world = run.engine.data_world
    if t.rollout_batch_size % (t.num_mini_batches * world):
        raise RecipeError(
            f"{run.section.name}.train.rollout_batch_size is {t.rollout_batch_size}, which {t.num_mini_batches} "
            f"minibatches on {world} processes do not divide; take a multiple of {t.num_mini_batches * world}"
        )


def longest_prompt(run: Run, policy: Parent) -> int:
    """Maximum tokens of a prompt: the recipe's, or fewer if an answer would not fit the window of the policy, or of
    another model that reads its tokens."""
    config: Config = run.config
    opened = partial(_reward_model, run)
    readers = [policy, *token_readers((*config.reward, *config.monitor), opened)]
    if config.critic is not None:
        readers.append(_critic_model(run, config.critic))
    return within_window(
        run, readers, "max_prompt_length", config.max_prompt_length, config.train.max_completion_length
    )


def load_prompts(
    run: Run,
    encoder: Encoder,
    sources: Sequence[SourceConfig],
    label: str,
    longest: int,
    scores: Sequence[RewardConfig],
    apart_from: Rows[EncodedPrompt] | None = None,
) -> Rows[EncodedPrompt]:
    """Encoded prompts; those of more than `longest` tokens or with unreadable gold answers are dropped.

    `apart_from`: as for `Run.rows`.
    """
    config: Config = run.config
    kind = Prompts(longest)
    prompts = run.rows(sources, kind, encoder, label, config.max_drop_fraction, apart_from=apart_from)
    return readable(run, scores, prompts, label, config.max_drop_fraction)


def _reward_model(run: Run, ref: str) -> Parent:
    return run.parent(f"reward:{ref}")


def _critic_model(run: Run, ref: str) -> Parent:
    config: Config = run.config
    return _reward_model(run, ref) if config.critic is None else run.parent("critic")


class PromptStream:
    """An endless stream of prompts: one keyed permutation of them after another."""

    def __init__(self, prompts: Sequence[EncodedPrompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed

    def __call__(self, cursor: int, count: int) -> list[EncodedPrompt]:
        """`count` prompts, starting at position `cursor`."""
        places = (divmod(position, len(self._prompts)) for position in range(cursor, cursor + count))
        return [
            self._prompts[int(_permutation(len(self._prompts), self._seed, epoch)[place])] for epoch, place in places
        ]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return shuffled(size, seed, "prompts", epoch)


def make_rewards(
    run: Run,
    entries: Sequence[RewardConfig],
    policy: Parent,
    bf16: bool,
    prompts: Sequence[EncodedPrompt],
    learned: dict[str, LearnedReward],
    frozen: list[Model],
    base: SharedBase | None,
) -> Composition:
    """The rewards of all entries, with frozen models, checked against the columns of the prompts.

    `learned`: the scorers loaded so far, by reference. New ones are added to it, and their models to `frozen`.
    `base`: as for `load_rewards`.
    """
    config: Config = run.config
    opened = partial(_reward_model, run)
    return load_rewards(
        run.engine,
        entries,
        opened,
        [policy],
        prompts,
        config.model_args,
        bf16=bf16,
        learned=learned,
        frozen=frozen,
        base=base,
    )


def load_policy(
    run: Run, parent: Parent, encoder: Encoder, dtype: torch.dtype | None, bf16: bool
) -> tuple[Model, SharedBase | None]:
    """The parent's model, without dropout, and its weights for other models if it trains an adapter.

    An engine that shards gives every model weights of its own.
    """
    config: Config = run.config
    keys: dict[str, Any] = {"dtype": dtype, "dropout": False, "bf16": bf16, "publish": config.publish_dtype}
    if config.adapter is None:
        return Model.load(run.engine, parent, "policy", encoder, config.model_args, **keys), None
    keys |= {"quantization": config.frozen_weights(), "frozen": True}  # until it has its adapter
    policy = Model.load(run.engine, parent, "policy", encoder, config.model_args, **keys)
    base = None if run.engine.splits else SharedBase(policy)
    return policy.adapt(config.adapter, run.seed), base


def load_reference(policy: Model, bf16: bool, *, moves: bool) -> Model | WithoutAdapter:
    """The frozen reference of a policy, set up to compute rows as the policy does. `moves`: as in `Model.reference`."""
    reference = policy.reference(bf16, moves=moves)
    if isinstance(reference, WithoutAdapter):
        return reference
    reference.freeze()
    with reference.whole() as module:
        ragged.enable(module)
    return reference


def fill(engine: Engine, prepared: nn.Module, policy: Model, critic: Model | None, heads: dict[str, Tensor]) -> None:
    """Gives the prepared policy and critic the values that an engine which shards did not load before.

    Then both compute rows without padding, if their architecture supports that.

    Args:
        engine: the engine that prepared them.
        prepared: the wrapped `ActorCritic`.
        policy: the policy's model.
        critic: the model whose body the critic has.
        heads: {name in `ActorCritic`: value} of the critic's head.
    """
    policy.fill(prepared, "policy")
    if critic is not None:
        critic.fill(prepared, "critic.body", of=critic.module.base_model_prefix)
    if engine.splits:
        engine.load_weights(prepared, heads.keys(), heads.__getitem__)
    with engine.whole(prepared) as actor:
        ragged.enable(actor.policy)
        if actor.critic is not None:
            ragged.enable(actor.critic.body)


def say_unused_loss(run: Run, policy: Model) -> None:
    """Says that the loss with which a mixture of experts balances them is not part of the policy's."""
    weight = policy.module.config.get_text_config().to_dict().get("router_aux_loss_coef")
    if weight:
        run.console.print(
            f"  the loss that balances the experts of {type(policy.module).__name__} (router_aux_loss_coef "
            f"{weight:g}) is not used by this stage"
        )


def make_critic(
    run: Run, policy: Parent, encoder: Encoder, dtype: torch.dtype | None, bf16: bool, base: SharedBase | None
) -> tuple[Model, Critic] | tuple[None, None]:
    """The critic, and the model whose body it has: the reward model, with the head scaled to the normalised reward.

    Without a reward model it is the policy's. None unless `advantage` is `gae`.

    With an adapter, the body is frozen and has an adapter of its own; on the weights of the policy (`base`) if it can
    share them.
    """
    config: Config = run.config
    if config.advantage != "gae":
        return None, None
    ref = config.critic_parent
    parent = policy
    if ref is not None:
        parent = _critic_model(run, ref)
        check_same_encoding(policy, parent, "the critic reads the policy's tokens; name another one under `critic`")
    adapter = config.adapter and config.adapter.model_copy(update={"modules_to_save": []})
    model = None if base is None else base.model(parent, "critic", encoder, adapter=adapter, seed=run.seed)
    if model is None:
        keys: dict[str, Any] = {"dtype": dtype, "dropout": False, "bf16": bf16, "adapter": adapter, "seed": run.seed}
        keys |= {"quantization": config.frozen_weights()}
        model = Model.load(run.engine, parent, "critic", encoder, config.model_args, **keys)
    critic = Critic(model.module, model.module.dtype if adapter is None else torch.float32)
    if ref is not None:
        weight = next((entry.weight for entry in config.reward if ref in entry.references), 1.0)
        head = model.module.get_submodule("score")
        assert isinstance(head, torch.nn.Linear)
        mean, std = statistics(parent) or (0.0, 1.0)  # as LearnedReward takes them
        critic.start_from_reward_head(head, mean, std, weight)
    return model, critic


def make_optimizer(model: ActorCritic, t: PPOTrainConfig, seed: int) -> torch.optim.Optimizer:
    """AdamW. Policy and critic have groups of their own, each without weight decay for norms and biases."""
    decayed = decayed_names(model)
    groups = []
    for part, rate in (("policy", t.learning_rate), ("critic", t.critic_learning_rate)):
        named = [(name, p) for name, p in model.named_parameters() if name.startswith(f"{part}.")]
        groups += [group | {"lr": rate, "part": part} for group in decay_groups(named, decayed, t.weight_decay)]
    return adamw(groups, t, seed, half=in_bfloat16(model))


def set_learning_rates(optimizer: torch.optim.Optimizer, t: PPOTrainConfig, iteration: int, factor: float) -> float:
    """Sets warm-up, then a constant rate or a linear fall to a tenth, times `factor`. Returns the policy's rate.

    The policy's rate is 0 while only the critic learns.
    """
    factor *= min(1.0, (iteration + 1) / max(1, t.warmup_iterations))
    if t.lr_decay == "linear":
        factor *= 1 - 0.9 * iteration / t.iterations
    policy = 0.0 if iteration < t.critic_warmup_iterations else t.learning_rate * factor
    for group in optimizer.param_groups:
        group["lr"] = policy if group["part"] == "policy" else t.critic_learning_rate * factor
    return policy
