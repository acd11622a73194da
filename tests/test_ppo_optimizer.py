"""What the policy-gradient loop builds: the optimizer's groups and rates, and what it says about a policy."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from stages.ppo.actor_critic import ActorCritic, Critic
from stages.ppo.config import PPOTrainConfig
from stages.ppo.setup import make_optimizer, say_unused_loss, set_learning_rates


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("with_critic", [True, False])
def test_norms_and_biases_do_not_decay_as_in_the_trainer(with_critic):
    model = ActorCritic(gpt2(), Critic(gpt2(), torch.float32) if with_critic else None)
    optimizer = make_optimizer(model, PPOTrainConfig(weight_decay=0.1), 0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if decay[id(p)] == 0.1}
    others = {name for name, p in model.named_parameters() if decay[id(p)] == 0.0}
    assert len(decay) == len(decayed) + len(others) == len(list(model.parameters()))
    assert {"policy.transformer.h.0.attn.c_attn.weight", "policy.transformer.wte.weight"} <= decayed
    assert {"policy.transformer.h.0.ln_1.weight", "policy.transformer.h.0.attn.c_attn.bias"} <= others
    assert ("critic.head.weight" in decayed) == ("critic.head.bias" in others) == with_critic

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rates(optimizer, PPOTrainConfig(learning_rate=0.5, critic_learning_rate=0.5, lr_decay="none"), 0, 1.0)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= decayed and "policy.transformer.wte.weight" in changed


def test_policy_and_critic_have_their_own_learning_rates():
    t = PPOTrainConfig(learning_rate=0.2, critic_learning_rate=0.5, critic_warmup_iterations=1, lr_decay="none")
    optimizer = make_optimizer(ActorCritic(gpt2(), Critic(gpt2(), torch.float32)), t, 0)
    for iteration, policy in ((0, 0.0), (1, 0.2)):
        assert set_learning_rates(optimizer, t, iteration, 1.0) == policy
        found = {(group["part"], group["lr"]) for group in optimizer.param_groups}
        assert found == {("policy", policy), ("critic", 0.5)}


def test_a_mixture_of_experts_is_told_that_its_balancing_loss_is_not_used():
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
            router_aux_loss_coef=0.02,
        )
    )
    said = []
    for module in (experts, gpt2()):
        console = Console(record=True, width=200, file=io.StringIO())
        say_unused_loss(SimpleNamespace(console=console), SimpleNamespace(module=module))
        said.append(console.export_text())
    assert "experts of MixtralForCausalLM (router_aux_loss_coef 0.02) is not used by this stage" in said[0]
    assert said[1] == ""
