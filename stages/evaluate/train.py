"""Evaluation: every model of the run answers the same held-out prompts, greedily and sampled.

    python -m stages.evaluate recipes/tiny.yaml

Greedy answers give accuracy and stop rate. Answers sampled with the same random numbers for every model give the gold
score (the embedded world's, which no other stage may read), the learned reward, the KL from the parent, and wins over
it. Held-out documents give bits per byte. Writes results.json beside the manifest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from data.records import Text
from data.rows import Prompts, Texts
from data.world import correct, gold
from handoff.errors import HandoffError
from handoff.files import write_json
from handoff.parent import Parent
from reward.learned import LearnedReward
from rollout.batch import pad_batch
from rollout.engine import generate
from rollout.logprobs import completion_logprobs
from rollout.sampling import Completion, SamplingSpec
from stages.evaluate.config import Config
from stages.evaluate.statistics import Estimate, mean, proportion
from training import models, runtime
from training.run import Run


@dataclass
class Answered:
    """One model's answers to all prompts, in the prompts' order; `rewards` and `kl` where they could be had."""

    greedy: list[Completion]
    greedy_texts: list[str]
    sampled: list[Completion]
    texts: list[str]
    rewards: list[float] | None = None
    kl: list[float] | None = None


def train(run: Run) -> None:
    """Runs the stage (it trains nothing; every stage's entry has this name)."""
    config: Config = run.config
    present = run.present_parents()
    parents = {name: present[name] for name in config.models if name in present}
    for name in config.models:
        if name not in parents:
            run.console.print(f"  {name}: not in this run, left out", markup=False)
    if not parents:
        raise HandoffError(
            f"{run.recipe.run_dir}: none of {', '.join(config.models)} has been published; make one with `baton run`"
        )

    # The prompts are encoded for each model by its own encoder: a foreign model keeps its own template.
    first = models.load_encoder(next(iter(parents.values())))
    prompts = run.rows(config.data, Prompts(config.max_prompt_length), first, "prompts")
    graded = prompts.facts.get("family") == len(prompts)
    documents = run.rows(config.text, Texts(Text), label="documents") if config.text else None

    answered: dict[str, Answered] = {}
    bits_per_byte: dict[str, dict[str, float]] = {}
    with run.progress(len(parents) * len(prompts) * 2, "evaluate") as advance:
        for name, parent in parents.items():
            encoder = models.load_encoder(parent)
            model = _frozen(models.load_causal_lm(parent, config.model_args, bf16=False))
            answered[name] = _answer(run, config, model, encoder, prompts, advance)
            if documents is not None:
                texts = [text for texts in documents for text in texts]
                bits_per_byte[name] = {"value": _bits_per_byte(model, encoder, texts, config)}
            origin = parent.manifest.parents.get("parent") if parent.manifest is not None else None
            if origin is not None and origin.name in answered:
                reference = _frozen(models.load_causal_lm(parents[origin.name], config.model_args, bf16=False))
                ids = [encoder.prompt(p.record.messages) for p in prompts]
                logp = _logprobs(reference, ids, answered[name].sampled, encoder.pad_id, config)
                answered[name].kl = [sum(c.logprobs) - lp for c, lp in zip(answered[name].sampled, logp, strict=True)]
                del reference
            if config.reward is not None and config.reward in present:
                answered[name].rewards = _rewards(config, present[config.reward], parent, prompts, answered[name])
            del model

    results = {
        "models": list(parents),
        "metrics": {name: _metrics(run.seed, prompts, a, graded) for name, a in answered.items()},
        "families": _families(prompts, answered) if graded else {},
        "win_rates": _win_rates(run.seed, parents, prompts, answered, graded),
        "bits_per_byte": bits_per_byte,
        "samples": [
            {
                "prompt": "\n".join(m.content for m in prompts[i].record.messages),
                "reference": prompts[i].record.columns.get("answer"),
                "answers": {name: a.greedy_texts[i] for name, a in answered.items()},
            }
            for i in _spread(prompts, config.samples)
        ],
    }
    if run.is_main:
        write_json(run.dir.path / "results.json", results)
    run.publish("evaluation", None, _headline(results), files=["results.json"])


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    return model.eval().requires_grad_(False).to(runtime.device())


def _answer(
    run: Run, config: Config, model: PreTrainedModel, encoder: Encoder, prompts: Sequence[EncodedPrompt], advance: Any
) -> Answered:
    """Greedy and sampled answers; each process its share, then all."""
    mine = list(range(runtime.rank(), len(prompts), runtime.world_size()))
    ids = [encoder.prompt(prompts[i].record.messages) for i in mine]
    both = []
    for temperature in (0.0, config.temperature):
        spec = SamplingSpec(config.max_new_tokens, tuple(encoder.stop_ids), encoder.pad_id, temperature)
        keys = [("evaluate", i) for i in mine]
        completions = generate(model, ids, spec, keys, run.seed, config.batch_size, advance)
        shares = runtime.all_gather_object(list(zip(mine, completions, strict=True)))
        both.append([c for _, c in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])])
    greedy, sampled = both
    return Answered(greedy, [encoder.decode(c.ids) for c in greedy], sampled, [encoder.decode(c.ids) for c in sampled])


@torch.no_grad()
def _logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    completions: Sequence[Completion],
    pad_id: int,
    config: Config,
) -> list[float]:
    """Sum over each completion of log π(token), nats, under the sampling temperature."""
    out = [0.0] * len(completions)
    order = sorted(range(len(completions)), key=lambda i: -len(prompt_ids[i]) - len(completions[i].ids))
    for start in range(0, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        batch = pad_batch([prompt_ids[i] for i in rows], [completions[i].ids for i in rows], pad_id, model.device)
        chosen, _ = completion_logprobs(model, batch, config.temperature)
        sums = torch.where(batch.completion_mask, chosen, 0.0).sum(-1)
        for row, value in zip(rows, sums.tolist(), strict=True):
            out[row] = value
    return out


def _rewards(
    config: Config, reward: Parent, policy: Parent, prompts: Sequence[EncodedPrompt], answered: Answered
) -> list[float]:
    """Normalised scores of the learned reward model; it may have an encoding of its own."""
    model = _frozen(models.load_reward_model(reward, config.model_args, bf16=False))
    encoder = models.load_encoder(policy)
    messages = [p.record.messages for p in prompts]
    return LearnedReward(reward, model, policy, reencode=True)(
        messages,
        answered.texts,
        [encoder.prompt(m) for m in messages],
        [c.ids for c in answered.sampled],
        [c.end == "stop" for c in answered.sampled],
    )


@torch.no_grad()
def _bits_per_byte(model: PreTrainedModel, encoder: Encoder, texts: Sequence[str], config: Config) -> float:
    """−Σ log2 p(token) / bytes; a token is predicted from half to a whole context, or all that stands before it."""
    nats, size = 0.0, 0
    context, stride = config.context_length, config.context_length // 2
    windows: list[tuple[list[int], int]] = []  # tokens, and how many of the last ones count
    for text, ids in zip(texts, encoder.documents(texts), strict=True):
        size += len(text.encode())
        windows.append((ids[:context], len(ids[:context]) - 1))
        windows += [
            (ids[end - context : end], end - start)
            for start in range(context, len(ids), stride)
            for end in [min(start + stride, len(ids))]
        ]
    for start in range(0, len(windows), config.batch_size):
        chunk = windows[start : start + config.batch_size]
        width = max(len(ids) for ids, _ in chunk)
        tokens = torch.full((len(chunk), width), encoder.pad_id, dtype=torch.long)
        counted = torch.zeros((len(chunk), width), dtype=torch.bool)
        for i, (ids, count) in enumerate(chunk):  # padding on the right needs no mask in a causal model
            tokens[i, : len(ids)] = torch.as_tensor(ids)
            counted[i, len(ids) - count : len(ids)] = True
        tokens = tokens.to(model.device)
        logp = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[:, :-1].float(), -1)
        chosen = logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        nats -= torch.where(counted[:, 1:].to(model.device), chosen, 0.0).sum().item()
    return nats / math.log(2) / size


def _metrics(seed: int, prompts: Sequence[EncodedPrompt], a: Answered, graded: bool) -> dict[str, Estimate]:
    out = {
        "stop_rate": proportion([c.end == "stop" for c in a.greedy]),
        "length_tokens": mean([float(len(c.ids)) for c in a.sampled], seed),
    }
    if graded:
        out["accuracy"] = proportion(_correct(prompts, a.greedy_texts))
        out["accuracy_sampled"] = proportion(_correct(prompts, a.texts))
        out["gold"] = mean(_gold(prompts, a.texts), seed)
        out["gold_greedy"] = mean(_gold(prompts, a.greedy_texts), seed)
    if a.rewards is not None:
        out["reward"] = mean(a.rewards, seed)
    if a.kl is not None:
        out["kl"] = mean(a.kl, seed)
    return out


def _families(prompts: Sequence[EncodedPrompt], answered: dict[str, Answered]) -> dict[str, dict[str, Estimate]]:
    """Greedy accuracy of each instruction family, for each model."""
    out: dict[str, dict[str, Estimate]] = {}
    for family in dict.fromkeys(p.record.columns["family"] for p in prompts):
        rows = [i for i, p in enumerate(prompts) if p.record.columns["family"] == family]
        out[family] = {
            name: proportion(_correct([prompts[i] for i in rows], [a.greedy_texts[i] for i in rows]))
            for name, a in answered.items()
        }
    return out


def _win_rates(
    seed: int,
    parents: dict[str, Parent],
    prompts: Sequence[EncodedPrompt],
    answered: dict[str, Answered],
    graded: bool,
) -> dict[str, dict[str, Any]]:
    """How often a model's sampled answer is better than its parent's to the same prompt; ties are half a win."""
    out = {}
    for name, parent in parents.items():
        origin = parent.manifest.parents.get("parent") if parent.manifest is not None else None
        if origin is None or origin.name not in answered:
            continue
        if graded:
            mine, theirs = (_gold(prompts, answered[n].texts) for n in (name, origin.name))
        elif (a := answered[name].rewards) is not None and (b := answered[origin.name].rewards) is not None:
            mine, theirs = a, b
        else:
            continue
        wins = [0.5 if x == y else float(x > y) for x, y in zip(mine, theirs, strict=True)]
        out[name] = {"over": origin.name, "by": "gold" if graded else "reward", **mean(wins, seed)}
    return out


def _correct(prompts: Sequence[EncodedPrompt], texts: Sequence[str]) -> list[bool]:
    return [correct(p.record.columns, text) for p, text in zip(prompts, texts, strict=True)]


def _gold(prompts: Sequence[EncodedPrompt], texts: Sequence[str]) -> list[float]:
    return [gold(p.record.columns, text) for p, text in zip(prompts, texts, strict=True)]


def _spread(prompts: Sequence[EncodedPrompt], count: int) -> list[int]:
    """Prompts to show: one of each family first, then the next ones."""
    seen: dict[Any, int] = {}
    ranked = []
    for i, prompt in enumerate(prompts):
        family = prompt.record.columns.get("family")
        seen[family] = seen.get(family, 0) + 1
        ranked.append((seen[family], i))
    return sorted(i for _, i in sorted(ranked)[:count])


def _headline(results: dict[str, Any]) -> dict[str, float]:
    """The last model's numbers, for the stage table."""
    last = results["models"][-1]
    out = {f"{last}/{metric}": estimate["value"] for metric, estimate in results["metrics"][last].items()}
    if last in results["win_rates"]:
        out[f"{last}/win_rate"] = results["win_rates"][last]["value"]
    return out
