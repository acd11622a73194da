"""Policy-gradient training: samples answers, scores them, and makes the better ones more probable.

    python -m stages.ppo recipes/tiny.yaml [--section grpo]
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.ppo recipes/tiny.yaml

All algorithms share one loop. The section's `advantage` sets the baseline of an answer's reward: a critic's value
(`gae`: PPO), the other answers to its prompt (`group`: GRPO; `leave_one_out`: RLOO), or the mean of all answers
(`global_baseline`: REINFORCE++).

Legend: N trajectories of an iteration over all processes, ΣC their tokens after the prompts, R the maximum of one
trajectory, B rows of a micro-batch.

Differences from the papers that advantages.py and loss.py cite:
1. The old log-probabilities come from sampling, which saves a forward pass. Where engine and trainer round differently
   (autocast, vLLM), the trainer computes them. The difference is logged and limited, and corrected by importance
   weights if the recipe sets `importance_sampling`.
2. Each process samples and scores its share, then all get all N trajectories (they are small compared with the model).
   Advantages, minibatches and counts are global, and the same for any number of processes.
3. The critic starts from the reward model, its head scaled to the normalised reward.
4. Dropout is off throughout, so that ratios are 1 until the weights change.
5. The published policy is the best one evaluated on held-out prompts, not the last one (guards.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from data.encode import EncodedPrompt
from data.sampling import shuffled
from handoff.weights import embedding_shape
from reward.learned import LearnedReward
from rollout import ragged
from rollout.mismatch import check_mismatch, mismatch_metrics, truncated_importance_weights, usual_limit
from rollout.positions import check_positions
from rollout.sampling import SamplingSpec
from rollout.vllm import VLLMEngine
from stages.ppo import loss as losses
from stages.ppo.actor_critic import ActorCritic, micro_batches
from stages.ppo.advantages import (
    explained_variance,
    gae,
    global_baseline,
    group_relative,
    leave_one_out,
    length_adaptive_lam,
    over_tokens,
    token_rewards,
)
from stages.ppo.config import Config, PPOTrainConfig
from stages.ppo.generation import Generator
from stages.ppo.guards import Watch, probe, probe_size
from stages.ppo.metrics import PUBLISHED, iteration_metrics, judged, mean_repetition, part_means, sample_rows
from stages.ppo.sampler import Sampler, rewards_of
from stages.ppo.saves import Saves
from stages.ppo.setup import (
    PromptStream,
    check_batch,
    fill,
    load_policy,
    load_prompts,
    load_reference,
    longest_prompt,
    make_critic,
    make_optimizer,
    make_rewards,
    say_unused_loss,
    set_learning_rates,
)
from training.model import Model, load_encoder
from training.precision import trained_dtype
from training.run import Run


def train(run: Run) -> None:
    """Runs the stage. Raises GateError when a guard ends the training (guards.py), Stopped after a signal."""
    config: Config = run.config
    t, guards = config.train, config.guards
    engine = run.engine
    device = engine.device
    check_batch(run, t)
    run.mirror(t.report_to)

    # Parents, prompts, rewards.
    parent = run.parent("parent")
    engine.set_up(t, embedding_shape(parent.weights_dir)[1])
    bf16 = engine.bf16
    encoder = load_encoder(parent)
    most = longest_prompt(run, parent)
    prompts = load_prompts(run, encoder, config.data, "prompts", most, config.reward)
    longest = int(prompts.lengths.max())
    heldout: Sequence[EncodedPrompt] = []
    if config.eval_data:
        scores = [*config.reward, *config.monitor]
        held = load_prompts(run, encoder, config.eval_data, "held-out prompts", most, scores, prompts)
        heldout, longest = held, max(longest, int(held.lengths.max()))
    dtype = trained_dtype(engine, config.model_args, config.adapter)
    policy, base = load_policy(run, parent, encoder, dtype, bf16)
    learned: dict[str, LearnedReward] = {}
    frozen: list[Model] = []
    rewards = make_rewards(run, config.reward, parent, bf16, prompts, learned, frozen, base)
    monitor = None
    if config.monitor:
        monitor = make_rewards(run, config.monitor, parent, bf16, heldout, learned, frozen, base)

    # Models.
    run.rehearse("causal_lm", policy)
    critic_model, critic = make_critic(run, parent, encoder, dtype, bf16, base)
    reference = load_reference(policy, bf16, moves=t.sync_ref_model)
    check_positions(policy.module, longest + t.max_completion_length)
    say_unused_loss(run, policy)
    if t.gradient_checkpointing:
        policy.module.gradient_checkpointing_enable()
    actor_critic = ActorCritic(policy.module, critic)
    heads = {
        name: value.clone() for name, value in actor_critic.state_dict().items() if name.startswith("critic.head.")
    }
    model, optimizer = engine.prepare(actor_critic, make_optimizer(actor_critic, t, run.seed))
    fill(engine, model, policy, critic_model, heads)
    padded_rows = not ragged.enabled(policy.module)
    vllm = None
    if config.vllm is not None:
        vllm = VLLMEngine(config.vllm, parent.weights_dir, device, run.is_main, engine.data_world)
        run.on_close(vllm.close)
        engine.barrier()  # the main process may have started the server
    spec = SamplingSpec.of(encoder, t.max_completion_length, temperature=t.temperature)
    generator = Generator(run.seed, spec, t.rollout_micro_batch_size, engine, model, vllm, policy.adapter)
    sampler = Sampler(t, encoder, engine, generator, reference, rewards, monitor, frozen)
    stream = PromptStream(prompts, run.seed)
    phases = sampler.phases

    # Resume between two iterations: an iteration depends only on the saved state and its own number.
    saves = Saves(run, model, optimizer, reference)
    at = saves.resume()
    watch = at.watch
    if at.iteration == 0 and guards.probe_prompts:
        first = sampler.answer(stream(0, guards.probe_prompts), ("probe",), probe_size(t))
        run.log(0, probe(first, t, guards))
        phases.take()
    run.signals.finish_steps(t.grace_seconds)
    with run.progress(t.iterations, "ppo") as advance:
        advance(at.iteration)
        for iteration in range(at.iteration, t.iterations):
            if heldout and iteration == 0:
                _look(run, sampler, heldout, 0, watch)
                phases.take()

            # Sample and score. The results are the same on every process.
            batch, at.cursor, sampling = sampler.batch(stream, at.cursor, iteration)
            with phases("advantage"):
                assert batch.old_logp is not None and batch.ref_logp is not None
                mask = batch.pad(batch.actions).to(device)  # (N, R)
                old_logp = batch.pad(batch.old_logp).to(device)  # (N, R)
                ref_logp = batch.pad(batch.ref_logp).to(device)  # (N, R)
                reward = rewards_of(batch, t, device)  # (N,)
                kl = losses.KL_ESTIMATORS[t.estimator](old_logp, ref_logp)
                dense = batch.pad(batch.token_reward).to(device) if batch.token_reward is not None else None
                token_reward = token_rewards(reward, kl if t.kl_in == "reward" else None, at.kl_coef, mask, dense)
                values = batch.pad(batch.values).to(device) if batch.values is not None else None
                advantages, returns = _advantages(config, token_reward, values, mask)
                weights = None  # (N, R)
                if generator.recomputes:
                    engine_logp = batch.pad(batch.engine_logp).to(device)
                    sampling |= mismatch_metrics(engine_logp, old_logp, mask)
                    check_mismatch(sampling, guards.mismatch_limit or usual_limit(run.engine.bf16))
                    if t.importance_sampling != "none":
                        level, cap = t.importance_sampling, t.importance_cap
                        weights = truncated_importance_weights(engine_logp, old_logp, mask, cap, level)
                if t.mask_truncated_completions:
                    mask = mask & batch.stopped.to(device)[:, None]
                targets = Targets(mask, old_logp, ref_logp, advantages, values, returns, weights)
                counted = mask.sum(-1).tolist()

            # Train.
            rate = set_learning_rates(optimizer, t, iteration, at.lr_factor)
            only_critic = iteration < t.critic_warmup_iterations
            found: dict[str, Tensor] = {}
            norms: list[float] = []
            sizes = (batch.prompt_length + batch.length).tolist()
            with phases("train"):
                for epoch in range(t.num_ppo_epochs):
                    order = shuffled(len(batch), run.seed, "minibatches", iteration, epoch)
                    for number, rows in enumerate(np.split(order, t.num_mini_batches)):
                        # The divisor counts the whole minibatch, over all processes.
                        divisor = losses.count([counted[i] for i in rows], t.loss_normaliser, t.max_completion_length)
                        each = t.per_device_train_batch_size
                        shares = micro_batches(sizes, rows.tolist(), each, engine.data_world, padded=padded_rows)
                        mine = engine.own(shares)
                        sums: dict[str, Tensor] = {}
                        for position, chunk in enumerate(mine):
                            padded = batch.padded(chunk, encoder.pad_id, device)
                            here = targets.pick(torch.tensor(chunk, device=device), padded.completion_ids.shape[1])
                            output = model(padded, t.temperature, t.entropy_coef > 0, encoder.vocab_size)
                            loss, parts = _loss(t, output, here, at.kl_coef, only_critic)
                            loss = losses.total(loss, here.mask, t.loss_normaliser) / divisor
                            engine.backward(model, loss, last=position == len(mine) - 1)
                            if not epoch == number == 0:
                                del parts["first_deviation"], parts["first_tokens"]
                            for key, value in (parts | {"loss": loss.detach()}).items():
                                sums[key] = sums.get(key, 0.0) + value.double()
                        norm = engine.step(model, optimizer, t.max_grad_norm)
                        if not math.isfinite(norm):
                            seen = engine.sums({"loss": sums["loss"].item()}) | {"grad_norm": norm}
                            place = {"epoch": epoch, "minibatch": number, "rows": sorted(rows.tolist())}
                            at.faults.skip(run, iteration + 1, t.max_skipped_steps, seen, place)
                            continue
                        at.faults.in_a_row = 0
                        norms.append(norm)
                        for key, value in sums.items():
                            found[key] = found.get(key, 0.0) + value
                read = {key: value.item() for key, value in found.items()}  # here only, since `item` waits for the GPU
                engine.release_memory()  # sampling needs tensors of other sizes
            total = engine.sums(read | judged(config))
            metrics = iteration_metrics(batch, total, t, at.kl_coef)
            metrics |= sampling | {
                "episode": (iteration + 1) * len(batch),
                "objective/rlhf_reward": token_reward.sum().item() / len(batch),
                "reward_std": reward.std().item(),
                "lr": rate,
                **({"grad_norm": sum(norms) / len(norms)} if norms else {}),
                **at.faults.metrics(),
            }
            metrics |= {key: value for key, value in total.items() if key.startswith("judge/")}
            if values is not None and returns is not None:
                metrics["val/explained_variance"] = explained_variance(values, returns, mask).item()
            watch.after_iteration(metrics, batch.reward, iteration, guards)
            if t.kl_controller == "adaptive":
                at.kl_coef = losses.adapt_kl_coef(
                    at.kl_coef, metrics["objective/kl"], t.kl_target, t.kl_horizon, len(batch)
                )
            at.measured = {key: metrics[key] for key in PUBLISHED}
            done = at.iteration = iteration + 1
            if t.sync_ref_model and done % t.ref_model_sync_steps == 0:
                sampler.move_reference(t.ref_model_mixup_alpha)
            generator.weights_moved()

            # Log before saving, so that the log is never behind a saved state. A resume cuts off the lines after its
            # state, and they are written again. The time of a save is in the next line.
            run.log(done, {**metrics, **{key: round(value, 4) for key, value in phases.take().items()}})
            looked = bool(heldout) and (done % t.sample_iterations == 0 or done == t.iterations)
            if looked:
                _look(run, sampler, heldout, done, watch)
                phases.take()
                verdict = saves.judge(at)
                if verdict == "stop":
                    break
                if verdict == "back":
                    generator.weights_moved()
            with phases("save"):
                saves.after_iteration(at, looked)
            advance(1)

    step, measured = saves.restore_best(at)
    run.publish(
        "causal_lm",
        lambda path: policy.write(path, model, "policy"),
        measured | watch.held_out(step) | {"kept_iteration": step},
        extra={"alarms": watch.alarms},
        step=at.iteration,
        adapter=policy.adapter_record(run.section.name),
    )


@dataclass(frozen=True)
class Targets:
    """The loss's fixed inputs. All (N, R), or (B, R) for a micro-batch; only entries in `mask` count."""

    mask: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None
    weights: Tensor | None

    def pick(self, rows: Tensor, width: int) -> "Targets":
        """The first `width` columns of the given rows."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part[rows, :width] for name, part in parts.items() if part is not None})


def _advantages(config: Config, rewards: Tensor, values: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Advantages and, with a critic, the returns that it learns to predict. All (N, R)."""
    t = config.train
    if config.advantage == "gae":
        assert values is not None
        lam = length_adaptive_lam(mask, t.lam_alpha) if t.lam == "length_adaptive" else t.lam
        advantages, returns = gae(rewards, values, mask, t.gamma, lam)
        if t.critic_lam is not None:
            _, returns = gae(rewards, values, mask, t.gamma, t.critic_lam)
        return (losses.masked_whiten(advantages, mask) if t.whiten_advantages else advantages), returns
    if config.advantage == "global_baseline":
        return global_baseline(rewards, mask, t.gamma, t.num_generations), None
    totals = losses.masked(rewards, mask).sum(-1)  # (N,)
    if config.advantage == "group":
        return over_tokens(group_relative(totals, t.num_generations, t.scale_rewards), mask), None
    return over_tokens(leave_one_out(totals, t.num_generations), mask), None


def _loss(
    t: PPOTrainConfig,
    output: tuple[Tensor, Tensor, Tensor | None],
    here: Targets,
    kl_coef: float,
    only_critic: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every action (B, R) of a micro-batch, and sums over its actions for the log.

    `output`: log-probabilities, entropies and values (B, R) of the current model.
    """
    logp, entropy, value = output
    policy, sums = _policy_loss(t, logp, here.old_logp, here.advantages, here.mask)
    if here.weights is not None:
        policy = policy * losses.masked(here.weights, here.mask)
    loss = policy
    if t.kl_in == "loss" and kl_coef > 0:
        # Mask before the estimator: the values in padding are arbitrary, and the gradient of a NaN would be NaN.
        pair = losses.masked(logp, here.mask), losses.masked(here.ref_logp, here.mask)
        loss = loss + kl_coef * losses.KL_ESTIMATORS[t.estimator](*pair)
    if t.entropy_coef > 0:
        loss = loss - t.entropy_coef * entropy
    if only_critic:
        loss = 0.0 * losses.masked(loss, here.mask)
    if value is not None:
        assert here.values is not None and here.returns is not None
        vf, vf_sums = losses.value_loss(value, here.values, here.returns, here.mask, t.cliprange_value)
        loss = loss + t.vf_coef * vf
        sums |= {"value": losses.masked(vf, here.mask).sum(), "vf_clipfrac": vf_sums["clipfrac"]}
    deviation = losses.masked(losses.bounded(logp - here.old_logp).exp() - 1, here.mask).abs().sum()
    tokens = here.mask.sum()
    sums |= {
        "policy": losses.masked(policy, here.mask).sum(),
        "entropy": losses.masked(entropy, here.mask).sum(),
        "tokens": tokens,
        "first_tokens": tokens,
        "first_deviation": deviation,
    }
    return loss, {key: value.detach() for key, value in sums.items()}


def _policy_loss(
    t: PPOTrainConfig, logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, losses.Sums]:
    """The loss that the recipe chooses, one number per token. All (B, R)."""
    low = t.cliprange
    match t.policy_loss:
        case "clip":
            return losses.clip_loss(logp, old, advantages, mask, low, low)
        case "clip_higher":
            return losses.clip_loss(logp, old, advantages, mask, low, t.cliprange_above)
        case "dual_clip":
            return losses.dual_clip_loss(logp, old, advantages, mask, low, low, t.dual_clip)
        case "gspo":
            return losses.sequence_ratio_loss(logp, old, advantages, mask, low, t.cliprange_above)
        case "cispo":
            return losses.clipped_weight_loss(logp, old, advantages, mask, t.cliprange_above)


def _look(run: Run, sampler: Sampler, heldout: Sequence[EncodedPrompt], step: int, watch: Watch) -> None:
    """Answers the held-out prompts with the same random numbers each time, logs the scores, stores some samples."""
    config: Config = run.config
    batch = sampler.annotate(sampler.answer(heldout, ("heldout",), 1, monitor=True), values=False)
    look = watch.look(step, batch, any(entry.references for entry in config.reward))
    metrics = {
        **look.metrics(),
        "eval/stop_rate": int(batch.stopped.sum()) / len(batch),
        "eval/repetition": mean_repetition(batch),
        ("eval/monitor" if config.monitor else "eval/length_controlled_scores"): look.monitor,
    }
    run.log(step, metrics | part_means(batch, "eval/rewards"))
    run.samples(step, sample_rows(batch, heldout, sampler.encoder))
