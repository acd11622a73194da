"""Losses, gradients and advantages on the same batch as TRL's own GRPO and RLOO trainers, within 1e-5.

TRL's trainers are constructed as a user would, on a model of 15 thousand weights, and their own `_compute_loss` and
`_generate_and_score_completions` run; only sampling is replaced, by answers that are given. Our side is what the loop
runs: `_loss` of stages/ppo/train.py, the normalisers, and the gradient of every weight.

One default differs: TRL multiplies the KL in the loss by the importance ratio (`use_bias_correction_kl`); GRPO's paper
does not, and neither do we.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rollout.batch import PaddedBatch, pad_batch
from rollout.logprobs import completion_logprobs
from rollout.mismatch import truncated_importance_weights
from stages.ppo import loss as losses
from stages.ppo import train as loop
from stages.ppo.advantages import group_relative, leave_one_out, over_tokens, token_rewards, without_signal
from stages.ppo.config import PPOTrainConfig

pytestmark = pytest.mark.slow

VOCABULARY, PAD, EOS = 40, 0, 1
GROUP, LONGEST, TEMPERATURE = 4, 9, 0.7
PROMPTS = [[5, 6, 7, 8], [9, 10]]
LENGTHS = [3, 7, 1, 5, 2, 7, 4, 6]


def random(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class World:
    """A policy that has moved off its reference, and answers with everything that a loss compares them with."""

    folder: Path
    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    answers: list[list[int]]
    padded: PaddedBatch
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor

    @property
    def mask(self) -> Tensor:
        return self.padded.completion_mask


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("trl")
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))])}
    bare = Tokenizer(models.WordLevel(words, unk_token="w2"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "reference")
    reference = LlamaForCausalLM.from_pretrained(folder / "reference").eval()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for i, weight in enumerate(policy.parameters()):
            weight += 0.03 * random(weight.shape, i)
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    g = torch.Generator().manual_seed(1)
    answers = [torch.randint(2, VOCABULARY, (n,), generator=g).tolist() for n in LENGTHS]
    for i in (1, 2, 6):
        answers[i][-1] = EOS
    padded = pad_batch(prompts, answers, PAD, torch.device("cpu"))
    with torch.no_grad():
        logp, _ = completion_logprobs(policy, padded, TEMPERATURE)
        ref_logp, _ = completion_logprobs(reference, padded, TEMPERATURE)
    old_logp = logp + 0.3 * random(logp.shape, 2)
    advantages = random(len(answers), 3)
    return World(folder, policy, reference, tokenizer, prompts, answers, padded, old_logp, ref_logp, advantages)


def trainer_of(world: World, kind: str, rewards: list[float] | None = None, **settings: Any) -> Any:
    """TRL's trainer, in the state that it is in during training."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    model = LlamaForCausalLM.from_pretrained(world.folder / "reference")  # named, so that TRL finds its reference again
    model.load_state_dict(world.policy.state_dict())
    args = config(
        output_dir=str(world.folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        per_device_train_batch_size=len(world.answers),
        num_generations=GROUP,
        max_completion_length=LONGEST,
        temperature=TEMPERATURE,
        **settings,
    )
    made = trainer(
        model,
        reward_funcs=lambda completions, **_: rewards,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w5"] * len(world.answers)}),
        processing_class=world.tokenizer,
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def inputs_of(world: World, mask: Tensor) -> dict[str, Tensor]:
    """The batch as TRL's `_compute_loss` takes it."""
    left = world.padded.input_ids.shape[1] - mask.shape[1]
    return {
        "prompt_ids": world.padded.input_ids[:, :left],
        "prompt_mask": world.padded.attention_mask[:, :left],
        "completion_ids": world.padded.completion_ids,
        "completion_mask": mask.long(),
        "advantages": world.advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": world.old_logp,
        "old_logps": losses.masked(world.old_logp, mask).sum(-1),
        "ref_per_token_logps": world.ref_logp,
    }


def gradients(model: PreTrainedModel, number: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(number, weights)))


def ours(
    world: World, mask: Tensor, settings: dict[str, Any], kl_coef: float, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss of the whole minibatch, gradients, and the sums that are logged."""
    t = PPOTrainConfig(temperature=TEMPERATURE, max_completion_length=LONGEST, kl_in="loss", **settings)
    logp, entropy = completion_logprobs(world.policy, world.padded, t.temperature, t.entropy_coef > 0)
    advantages = over_tokens(world.advantages, mask)
    targets = loop.Targets(mask, world.old_logp, world.ref_logp, advantages, None, None, weights)
    tokens, sums = loop._loss(t, (logp, entropy, None), targets, kl_coef, False)
    divisor = losses.count(mask.sum(-1).tolist(), t.loss_normaliser, t.max_completion_length)
    number = losses.total(tokens, mask, t.loss_normaliser) / divisor
    return number.detach(), gradients(world.policy, number), sums


def assert_same(number: Tensor, found: dict[str, Tensor], trainer: Any, theirs: Tensor) -> None:
    """Loss and the gradient of every weight, absolutely and by the size of the whole gradient."""
    expected = gradients(trainer.model, theirs)
    assert number.item() == pytest.approx(theirs.item(), abs=1e-5)
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    assert size > 0.01
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * max(1.0, size.item()), name
        assert (found[name] - gradient).norm() < 1e-5 * size, name


KL = {"beta": 0.1, "use_bias_correction_kl": False}
CASES = {
    # name: (TRL's settings, ours, β)
    "grpo": ({"loss_type": "grpo"}, {"loss_normaliser": "sequence"}, 0.0),
    "bnpo": ({"loss_type": "bnpo"}, {"loss_normaliser": "token"}, 0.0),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        {"loss_normaliser": "token", "policy_loss": "clip_higher", "cliprange_high": 0.28},
        0.0,
    ),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_normaliser": "constant"}, 0.0),
    "dual_clip": (
        {"loss_type": "bnpo", "delta": 1.3},
        {"loss_normaliser": "token", "policy_loss": "dual_clip", "dual_clip": 1.3},
        0.0,
    ),
    # TRL's epsilon_high is the bound itself here, the paper's and ours is its distance from 1.
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.28},
        {"loss_normaliser": "token", "policy_loss": "cispo", "cliprange_high": 0.28},
        0.0,
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
        {"loss_normaliser": "sequence", "policy_loss": "gspo", "cliprange": 0.1},
        0.0,
    ),
    "grpo_kl": ({"loss_type": "grpo", **KL}, {"loss_normaliser": "sequence"}, 0.1),
    "dapo_kl": ({"loss_type": "dapo", **KL}, {"loss_normaliser": "token"}, 0.1),
    "cispo_kl": (
        {"loss_type": "cispo", "epsilon_high": 1.28, **KL},
        {"loss_normaliser": "token", "policy_loss": "cispo", "cliprange_high": 0.28},
        0.1,
    ),
    "gspo_kl": (
        {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", **KL},
        {"loss_normaliser": "constant", "policy_loss": "gspo"},
        0.1,
    ),
    "entropy": ({"loss_type": "bnpo", "entropy_coef": 0.3}, {"loss_normaliser": "token", "entropy_coef": 0.3}, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_trls_grpo(world, case):
    theirs, own, beta = CASES[case]
    trainer = trainer_of(world, "grpo", **theirs)
    number, found, sums = ours(world, world.mask, own, beta)
    assert_same(number, found, trainer, trainer._compute_loss(trainer.model, inputs_of(world, world.mask)))
    # What is logged under TRL's names is what TRL logs.
    logged = trainer._metrics["train"]
    tokens = world.mask.sum()
    assert (sums["entropy"] / tokens).item() == pytest.approx(logged["entropy"][-1], rel=1e-5)
    if beta:
        kl = losses.masked(losses.kl_k3(trained_logp(world), world.ref_logp), world.mask).sum() / tokens
        assert kl.item() == pytest.approx(logged["kl"][-1], rel=1e-5)
    if case in ("bnpo", "dapo", "grpo", "dr_grpo"):
        assert (sums["clipfrac"] / tokens).item() == pytest.approx(logged["clip_ratio/region_mean"][-1], abs=1e-6)
        assert sums["clipfrac"] > 0
    if case == "cispo":
        assert (sums["clipfrac"] / tokens).item() == pytest.approx(logged["cispo_clip_ratio"][-1], abs=1e-6)


def trained_logp(world: World) -> Tensor:
    with torch.no_grad():
        return completion_logprobs(world.policy, world.padded, TEMPERATURE)[0]


@pytest.mark.parametrize("case", ["bnpo", "dapo"])
def test_answers_that_are_not_trained_on_count_for_nothing_under_the_token_normaliser(world, case):
    theirs, own, _ = CASES[case]
    mask = world.mask.clone()
    mask[3] = False
    trainer = trainer_of(world, "grpo", **theirs)
    number, found, _ = ours(world, mask, own, 0.0)
    assert_same(number, found, trainer, trainer._compute_loss(trainer.model, inputs_of(world, mask)))


def scored(world: World, trainer: Any, sampled_logp: Tensor | None = None) -> dict[str, Tensor]:
    """TRL's own advantages, old and reference log-probabilities for the answers that are given."""

    def answers(prompt_ids: Any, *_: Any) -> Any:
        if type(trainer).__name__ == "RLOOTrainer":
            return world.answers
        if sampled_logp is None:
            return world.answers, None
        return world.answers, [row[: len(ids)].tolist() for row, ids in zip(sampled_logp, world.answers)]

    trainer._generate_single_turn = answers
    return trainer._generate_and_score_completions([{"prompt": " ".join(f"w{i}" for i in p)} for p in world.prompts])


REWARDS = [0.3, 1.7, -2.0, 0.4, 5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(("scale_rewards", "scale"), [("group", True), ("none", False)])
@pytest.mark.parametrize("rewards", [REWARDS, [x / 1000 for x in reversed(REWARDS)]])
def test_group_advantages_are_those_of_trls_grpo(world, scale_rewards, scale, rewards):
    trainer = trainer_of(world, "grpo", rewards, scale_rewards=scale_rewards, beta=0.1)
    out = scored(world, trainer)
    advantages = group_relative(torch.tensor(rewards), GROUP, scale)
    assert torch.allclose(advantages, out["advantages"], atol=1e-5)
    assert torch.equal(out["completion_mask"].bool(), world.mask)
    assert torch.allclose(
        losses.masked(world.ref_logp - out["ref_per_token_logps"], world.mask), torch.zeros(()), atol=1e-5
    )
    silent = without_signal(torch.tensor(rewards), GROUP).float().mean().item()
    assert trainer._metrics["train"]["frac_reward_zero_std"][-1] == silent == 0.5


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_leave_one_out_advantages_with_the_kl_in_the_reward_are_those_of_trls_rloo(world, beta):
    out = scored(world, trainer_of(world, "rloo", REWARDS, beta=beta))
    old_logp = trained_logp(world)
    assert torch.allclose(losses.masked(old_logp, world.mask).sum(-1), out["old_logps"], atol=1e-5)
    kl = losses.kl_k1(old_logp, world.ref_logp)
    rewards = token_rewards(torch.tensor(REWARDS), kl, beta, world.mask)
    assert torch.allclose(leave_one_out(rewards.sum(-1), GROUP), out["advantages"], atol=1e-5)


def test_first_gradient_is_that_of_trls_rloo(world):
    """While the ratio is 1, TRL's mean over answers of their whole probability's ratio and our sum over tokens agree.

    The constant normaliser divides by the longest length, too, and TRL does not.
    """
    trainer = trainer_of(world, "rloo")
    inputs = inputs_of(world, world.mask)
    inputs["old_logps"] = losses.masked(trained_logp(world), world.mask).sum(-1)
    expected = gradients(trainer.model, trainer._compute_loss(trainer.model, inputs))
    first = World(**{**vars(world), "old_logp": trained_logp(world)})
    _, found, _ = ours(first, world.mask, {"loss_normaliser": "constant"}, 0.0)
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] * LONGEST - gradient).norm() < 1e-5 * size, name


def test_clipped_loss_of_answers_as_single_actions_is_trls_rloo(world):
    """Off the first step TRL clips the ratio of a whole answer's probability: our clipping, of one action an answer."""
    world = World(**{**vars(world), "old_logp": trained_logp(world) + 0.1 * random(world.old_logp.shape, 5)})
    trainer = trainer_of(world, "rloo", epsilon=0.1)
    theirs = trainer._compute_loss(trainer.model, inputs_of(world, world.mask))
    logp, _ = completion_logprobs(world.policy, world.padded, TEMPERATURE)
    new, old = (losses.masked(x, world.mask).sum(-1, keepdim=True) for x in (logp, world.old_logp))
    whole = torch.ones_like(new, dtype=torch.bool)
    tokens, sums = losses.clip_loss(new, old, world.advantages[:, None], whole, 0.1, 0.1)
    number = losses.total(tokens, whole, "sequence") / len(world.answers)
    assert 0 < sums["clipfrac"] < len(world.answers)
    assert_same(number.detach(), gradients(world.policy, number), trainer, theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_weights_and_their_loss_are_those_of_trls_grpo(world, level):
    """With log-probabilities of an engine that rounds otherwise; its being vLLM is told to TRL after the fact."""
    settings = {"vllm_importance_sampling_mode": f"{level}_truncate", "vllm_importance_sampling_clip_max": 1.1}
    trainer = trainer_of(world, "grpo", REWARDS, loss_type="bnpo", **settings)
    trainer.use_vllm = True
    engine_logp = trained_logp(world) + 0.1 * random(world.old_logp.shape, 6)
    out = scored(world, trainer, engine_logp)
    weights = truncated_importance_weights(engine_logp, trained_logp(world), world.mask, 1.1, level)
    assert torch.allclose(
        losses.masked(weights - out["importance_sampling_ratio"], world.mask), torch.zeros(()), atol=1e-5
    )
    assert (weights[world.mask] == 1.1).any() and (weights[world.mask] < 1).any()
    own = {"loss_normaliser": "token", "importance_sampling": level, "importance_cap": 1.1}
    number, found, _ = ours(world, world.mask, own, 0.0, weights)
    inputs = inputs_of(world, world.mask) | {"importance_sampling_ratio": out["importance_sampling_ratio"]}
    assert_same(number, found, trainer, trainer._compute_loss(trainer.model, inputs))
