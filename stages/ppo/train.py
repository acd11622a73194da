"""PPO: samples answers, scores them, and moves the policy towards the better ones without leaving the reference.

    python -m stages.ppo recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.ppo recipes/tiny.yaml

Legend: N answers of an iteration over all processes, R longest completion, B rows of a micro-batch.

Where it departs from Schulman et al. 2017 and Ziegler et al. 2019:
1. The old log-probabilities are those that sampling computed, so the first epoch needs no forward pass of its own for
   them. Under autocast (bf16) decoding and training round differently, and they are computed again.
2. Each process samples and scores its share, then all get all N answers (they are small beside the model). Whitening,
   minibatches and counts are global, and the same for any number of processes.
3. The critic starts from the reward model, its head scaled to the normalised reward.
4. Dropout is off throughout, so that a ratio is 1 until the weights move.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from data.encode import EncodedPrompt, Encoder, encode_prompts
from data.records import Prompt
from data.sampling import shuffled
from handoff.contract import check_same_encoding
from handoff.errors import GateError
from handoff.parent import Parent
from handoff.state import StateStore
from reward.compose import Composition
from reward.learned import LearnedReward
from rollout.batch import pad_batch, pad_values
from rollout.engine import SamplingSpec
from stages import models, runtime
from stages.ppo.actor_critic import ActorCritic, Critic, micro_batches
from stages.ppo.config import Config, PPOTrainConfig
from stages.ppo.loss import (
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked,
    masked_whiten,
    policy_loss,
    token_rewards,
    value_loss,
)
from stages.ppo.sampler import Rollout, Sampler
from stages.recipe import RecipeError
from stages.run import Run

# Before the first optimizer step the policy is the one that sampled: a ratio off 1 by more is a bug, not training.
_FIRST_RATIO_TOLERANCE = 0.01


def train(run: Run) -> None:
    """Runs the stage. Raises GateError when training has gone where no result can come from."""
    config: Config = run.config
    t = config.train
    accelerator = runtime.accelerator(t)
    device = runtime.device()
    world, rank = runtime.world_size(), runtime.rank()
    if t.rollout_batch_size % (t.num_mini_batches * world):
        raise RecipeError(
            f"{run.section.name}.train.rollout_batch_size is {t.rollout_batch_size}, which {t.num_mini_batches} "
            f"minibatches on {world} processes do not divide; take a multiple of {t.num_mini_batches * world}"
        )
    if t.report_to == "wandb":
        run.mirror()

    # Parents, prompts, rewards.
    parent = run.parent("parent")
    encoder = models.load_encoder(parent)
    prompts = _load_prompts(run, encoder, config.data, "prompts")
    heldout = _load_prompts(run, encoder, config.eval_data, "held-out prompts") if config.eval_data else []
    bf16 = accelerator.mixed_precision == "bf16"
    rewards = _load_rewards(run, config, parent, bf16)

    # Models.
    policy = models.load_causal_lm(parent, config.model_args, dropout=False, bf16=bf16)
    critic = _make_critic(run, config, parent, bf16)
    reference = models.load_causal_lm(parent, config.model_args, bf16=bf16).eval().requires_grad_(False).to(device)
    if t.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    actor_critic = ActorCritic(policy, critic)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.parameters()), "lr": t.learning_rate},
            {"params": list(critic.parameters()), "lr": t.critic_learning_rate},
        ],
        betas=(t.adam_beta1, t.adam_beta2),
        eps=t.adam_epsilon,
        weight_decay=t.weight_decay,
    )
    model, optimizer = runtime.prepare_model(accelerator, actor_critic, optimizer)
    spec = SamplingSpec(t.max_completion_length, tuple(encoder.stop_ids), encoder.pad_id, t.temperature)
    rollouts_of = Sampler(run.seed, t, encoder, spec, reference, rewards, accelerator, model)

    # Resume at the border of an iteration: the next one depends on nothing but the state and its own number.
    store = StateStore(run.dir.state_dir)
    state = runtime.broadcast_object(store.latest() if run.is_main and run.resumable else None)
    first, kl_coef = 0, t.kl_coef
    if state is not None:
        runtime.load_state(accelerator, model, optimizer, state.path)
        first, kl_coef = state.step, state.extra["kl_coef"]
        run.console.print(f"  resumes at iteration {first} of {t.iterations}", markup=False)
    elif run.is_main:
        store.clean()
    run.rewind(state.step if state is not None else None)
    save_every = t.save_iterations or max(1, t.iterations // 10)

    phases = rollouts_of.phases
    with run.progress(t.iterations, "ppo") as advance:
        advance(first)
        for iteration in range(first, t.iterations):
            if heldout and iteration == 0:
                _look(run, rollouts_of, heldout, 0)
                phases.take()

            # Sample and score: everything below is the same on every process.
            batch = rollouts_of(_prompts_of(prompts, t.rollout_batch_size, run.seed, iteration), ("ppo", iteration))
            width = max(len(r.ids) for r in batch)
            mask = torch.zeros((len(batch), width), dtype=torch.bool, device=device)  # (N, R)
            for i, r in enumerate(batch):
                mask[i, : len(r.ids)] = True
            old_logp = pad_values([r.old_logp for r in batch], width, device)  # (N, R)
            ref_logp = pad_values([r.ref_logp for r in batch], width, device)
            old_values = pad_values([r.values for r in batch], width, device)
            scores = torch.tensor([r.score - t.missing_eos_penalty * (not r.stopped) for r in batch], device=device)
            kl = kl_k1(old_logp, ref_logp)
            token_reward = token_rewards(scores, kl if t.kl_in == "reward" else None, kl_coef, mask)
            advantages, returns = gae(token_reward, old_values, mask, t.gamma, t.lam)
            variance = explained_variance(old_values, returns, mask).item()
            if t.whiten_advantages:
                advantages = masked_whiten(advantages, mask)

            # Train.
            rate = _set_learning_rates(optimizer, t, iteration)
            sums: dict[str, float] = defaultdict(float)
            norms: list[float] = []
            lengths = [len(r.prompt.ids) + len(r.ids) for r in batch]
            with phases("train"):
                for epoch in range(t.num_ppo_epochs):
                    order = shuffled(len(batch), run.seed, "minibatches", iteration, epoch)
                    for number, rows in enumerate(np.split(order, t.num_mini_batches)):
                        count = mask[torch.as_tensor(rows)].sum()  # of the whole minibatch, on all processes
                        mine = micro_batches(lengths, rows.tolist(), t.per_device_train_batch_size, rank, world)
                        for position, chunk in enumerate(mine):
                            at = torch.tensor(chunk, device=device)
                            padded = pad_batch(
                                [batch[i].prompt.ids for i in chunk],
                                [batch[i].ids for i in chunk],
                                encoder.pad_id,
                                device,
                            )
                            wide = padded.completion_ids.shape[1]
                            real = padded.completion_mask  # (B, R')
                            logp, entropy, values = model(padded, t.temperature)
                            pg, _, pg_sums = policy_loss(
                                logp, old_logp[at, :wide], advantages[at, :wide], real, t.cliprange
                            )
                            vf, _, vf_sums = value_loss(
                                values, old_values[at, :wide], returns[at, :wide], real, t.cliprange_value
                            )
                            loss = pg + t.vf_coef * vf
                            if t.kl_in == "loss":
                                loss = loss + kl_coef * masked(kl_k3(logp, ref_logp[at, :wide]), real).sum()
                            runtime.backward(accelerator, model, loss / count, last=position == len(mine) - 1)
                            with torch.no_grad():
                                sums["tokens"] += real.sum().item()
                                sums["policy"] += pg.item()
                                sums["value"] += vf.item()
                                sums["entropy"] += masked(entropy, real).sum().item()
                                sums["vf_clipfrac"] += vf_sums["clipfrac"].item()
                                for key, value in pg_sums.items():
                                    sums[key] += value.item()
                                if epoch == number == 0:
                                    sums["first_tokens"] += real.sum().item()
                                    sums["first_deviation"] += (
                                        masked((logp - old_logp[at, :wide]).exp() - 1, real).abs().sum().item()
                                    )
                        norms.append(runtime.step(model, optimizer, t.max_grad_norm))
            if not all(math.isfinite(value) for value in (*sums.values(), *norms)):
                raise GateError(
                    f"iteration {iteration}: a loss or a gradient is not finite ({dict(sums)}); the last saved state "
                    "is intact. Lower the learning rates, or look at the rewards in samples.jsonl."
                )
            total = _sum_over_ranks(sums)
            tokens = total["tokens"]
            answer_kl = sum(r.kl for r in batch) / len(batch)
            metrics = {
                "episode": (iteration + 1) * len(batch),
                "objective/kl": answer_kl,
                "objective/entropy": -sum(sum(r.old_logp) for r in batch) / len(batch),
                "objective/scores": sum(r.score for r in batch) / len(batch),
                "objective/non_score_reward": -kl_coef * answer_kl if t.kl_in == "reward" else 0.0,
                "objective/rlhf_reward": token_reward.sum().item() / len(batch),
                "objective/kl_coef": kl_coef,
                "policy/approxkl_avg": total["approxkl"] / tokens,
                "policy/clipfrac_avg": total["clipfrac"] / tokens,
                "policy/entropy_avg": total["entropy"] / tokens,
                "loss/policy_avg": total["policy"] / tokens,
                "loss/value_avg": total["value"] / tokens,
                "val/clipfrac_avg": total["vf_clipfrac"] / tokens,
                "val/ratio": total["ratio"] / tokens,
                "val/first_ratio_deviation": total["first_deviation"] / total["first_tokens"],
                "val/explained_variance": variance,
                "val/num_eos_tokens": sum(r.stopped for r in batch),
                "completions/mean_length": sum(len(r.ids) for r in batch) / len(batch),
                "completions/clipped_ratio": sum(not r.stopped for r in batch) / len(batch),
                "grad_norm": sum(norms) / len(norms),
                "lr": rate,
                **_part_means(batch),
            }
            _stop_if_lost(metrics, t, iteration)
            if t.kl_controller == "adaptive":
                kl_coef = adapt_kl_coef(kl_coef, answer_kl, t.kl_target, t.kl_horizon, len(batch))

            # Logged first, so that a state never lacks a line of its past; what is behind a state is cut off and
            # written again. The seconds of a save are in the line after it.
            done = iteration + 1
            run.log(done, {**metrics, **{key: round(value, 4) for key, value in phases.take().items()}})
            if heldout and (done % t.sample_iterations == 0 or done == t.iterations):
                _look(run, rollouts_of, heldout, done)
                phases.take()
            if done % save_every == 0 and done < t.iterations:
                with phases("save"):
                    _save(store, run, accelerator, model, optimizer, done, kl_coef, t.save_total_limit)
            advance(1)

    weights = runtime.full_state_dict(accelerator, model)
    policy_weights = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    run.publish(
        "causal_lm",
        lambda path: models.save_model(policy, encoder, path, policy_weights),
        {key: metrics[key] for key in ("objective/scores", "objective/kl", "completions/mean_length")},
    )


def _prompts_of(prompts: Sequence[EncodedPrompt], size: int, seed: int, iteration: int) -> list[EncodedPrompt]:
    """The iteration's prompts: epochs of keyed permutations, laid end to end and cut into pieces of `size`."""
    chosen = []
    for position in range(iteration * size, (iteration + 1) * size):
        epoch, place = divmod(position, len(prompts))
        chosen.append(prompts[_permutation(len(prompts), seed, epoch)[place]])
    return chosen


def _look(run: Run, rollouts_of: Sampler, heldout: Sequence[EncodedPrompt], step: int) -> None:
    """Answers the held-out prompts with the same random numbers each time; logs their score and shows some."""
    batch = rollouts_of(heldout, ("heldout",))
    run.log(
        step,
        {
            "eval/scores": sum(r.score for r in batch) / len(batch),
            "eval/kl": sum(r.kl for r in batch) / len(batch),
            "eval/mean_length": sum(len(r.ids) for r in batch) / len(batch),
            "eval/stop_rate": sum(r.stopped for r in batch) / len(batch),
        },
    )
    shown = batch[:8]
    run.samples(
        step,
        [
            {"prompt": r.prompt.record.messages[-1].content, "completion": r.text, "score": r.score, "parts": r.parts}
            for r in shown
        ],
    )


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return shuffled(size, seed, "prompts", epoch)


def _load_prompts(run: Run, encoder: Encoder, sources: Sequence[Any], label: str) -> list[EncodedPrompt]:
    config: Config = run.config
    loaded = run.load(sources, Prompt)
    prompts = encode_prompts(loaded.records, encoder, config.max_prompt_length, loaded.accounting)
    run.account(loaded, label, config.max_drop_fraction)
    return prompts


def _load_rewards(run: Run, config: Config, policy: Parent, bf16: bool) -> Composition:
    """Every entry of `reward`, with its models loaded and frozen."""
    learned = {}
    for entry in config.reward:
        if entry.model is None:
            continue
        parent = run.parent(f"reward:{entry.model}", frozenset({"reward_model"}))
        model = models.load_reward_model(parent, config.model_args, bf16=bf16).eval().requires_grad_(False)
        model.to(runtime.device())
        learned[entry.model] = LearnedReward(parent, model, policy, reencode=entry.reencode)
    return Composition(config.reward, learned)


def _make_critic(run: Run, config: Config, policy: Parent, bf16: bool) -> Critic:
    """From the reward model, with its head in the units of the normalised reward; else from the policy's body."""
    ref = config.critic_parent
    if ref is None:
        return Critic(models.load_causal_lm(policy, config.model_args, dropout=False, bf16=bf16))
    role = "critic" if config.critic is not None else f"reward:{ref}"
    parent = run.parent(role, frozenset({"reward_model"}))
    check_same_encoding(policy, parent, "the critic reads the policy's tokens; name another one under `critic`")
    model = models.load_reward_model(parent, config.model_args, dropout=False, bf16=bf16)
    critic = Critic(model)
    weight = next((entry.weight for entry in config.reward if entry.model == ref), 1.0)
    assert parent.manifest is not None  # a reward model of another origin has been refused above
    statistics = parent.manifest.extra
    critic.start_from_reward_head(
        model.get_submodule("score"), statistics["reward_mean"], statistics["reward_std"], weight
    )
    return critic


def _set_learning_rates(optimizer: torch.optim.Optimizer, t: PPOTrainConfig, iteration: int) -> float:
    """Warm-up, then constant or linear to a tenth. Returns the policy's rate."""
    factor = min(1.0, (iteration + 1) / max(1, t.warmup_iterations))
    if t.lr_decay == "linear":
        factor *= 1 - 0.9 * iteration / t.iterations
    for group, peak in zip(optimizer.param_groups, (t.learning_rate, t.critic_learning_rate), strict=True):
        group["lr"] = peak * factor
    return t.learning_rate * factor


def _sum_over_ranks(sums: dict[str, float]) -> dict[str, float]:
    shares = runtime.all_gather_object(dict(sums))
    return {key: sum(share[key] for share in shares) for key in sums}


def _part_means(batch: Sequence[Rollout]) -> dict[str, float]:
    """Mean of each reward over the answers on which it had an opinion."""
    means = {}
    for name in batch[0].parts:
        values = [r.parts[name] for r in batch if r.parts[name] is not None]
        if values:
            means[f"rewards/{name}"] = sum(values) / len(values)
    return means


def _stop_if_lost(metrics: dict[str, float], t: PPOTrainConfig, iteration: int) -> None:
    """Raises GateError, in plain words, when going on cannot help."""
    if metrics["objective/kl"] > t.kl_limit:
        raise GateError(
            f"iteration {iteration}: an answer is {metrics['objective/kl']:.1f} nats from the reference, above "
            f"kl_limit {t.kl_limit}. Usual causes: learning_rate too high, kl_coef too low, a reward without bound."
        )
    if metrics["val/first_ratio_deviation"] > _FIRST_RATIO_TOLERANCE:
        raise GateError(
            f"iteration {iteration}: before any step the policy differs from the one that sampled by "
            f"{metrics['val/first_ratio_deviation']:.3f} on average. Sampling and training disagree on precision, "
            "positions or temperature; training on such ratios would mislead."
        )


def _save(
    store: StateStore,
    run: Run,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    kl_coef: float,
    keep: int,
) -> None:
    """Saves what the next iteration starts from. Every rank calls it; a full disk costs the save, not the run."""
    staged = runtime.broadcast_object(store.staging(iteration) if run.is_main else None)
    try:
        runtime.save_state(accelerator, model, optimizer, staged)
        if run.is_main:
            store.commit(iteration, staged, keep, {"kl_coef": kl_coef})
    except OSError as error:
        run.console.print(f"  could not save iteration {iteration}: {error}; the state before it is kept", markup=False)
    runtime.barrier()
