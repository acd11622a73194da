"""Policy-gradient training of an adapter: one frozen base for policy, reference, critic and reward model."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from handoff.manifest import QuantizationRecord, read_manifest
from handoff.parent import open_parent
from reward.learned import score
from rollout.batch import pad_batch
from stages.ppo import setup
from stages.ppo.actor_critic import Critic
from stages.ppo.saves import Saves
from tests.test_resume import dies
from training import engines
from training.config import AdapterConfig, ModelArguments
from training.model import Model, load_encoder
from training.recipe import RecipeError, load_recipe
from training.run import run_section
from training.shared import SharedBase
from training.stored_adapter import StoredAdapter

pytestmark = pytest.mark.slow  # models are trained and loaded again

ENGINE = engines.current()
QUICK = ("adapter.r=4", "train.iterations=2", "guards={probe_prompts: 0, keep: last}", "train.save_iterations=1")
ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]


def of(micro, output, *overrides, section="ppo"):
    """Runs a section on the parents of the micro recipe, or on others that an override names."""
    folder = load_recipe(micro).run_dir
    parents = [f"{section}.parent={folder / 'sft'}"]
    if section == "ppo":
        parents.append("ppo.reward=[{model: " + str(folder / "reward") + "}]")
    recipe = load_recipe(micro, [f"output_root={output}", *parents, *(f"{section}.{key}" for key in overrides)])
    run_section(recipe, section)
    return recipe.run_dir / section


def lines(folder):
    import json

    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in found]


@pytest.fixture(scope="module")
def adapters(micro_recipe, tmp_path_factory):
    """SFT and a reward model on it, both adapters."""
    root = tmp_path_factory.mktemp("adapters")
    pretrained = load_recipe(micro_recipe).run_dir / "pretrain"
    keys = ("adapter.r=4", "train.max_steps=6")
    sft = of(micro_recipe, root, f"parent={pretrained}", *keys, section="sft")
    reward = of(micro_recipe, root, f"parent={sft}", *keys, section="reward")
    return sft, reward


def test_policy_reference_and_sampling_agree_at_the_start(micro_recipe, tmp_path):
    """The first iteration is that of full training: the adapter changes nothing yet, and its ratios are 1."""
    whole = lines(of(micro_recipe, tmp_path / "whole", *QUICK[1:], "train.iterations=1"))
    ours = lines(of(micro_recipe, tmp_path / "adapter", *QUICK, "train.iterations=1"))
    first, second = (next(line for line in found if line["step"] == 1) for found in (whole, ours))
    for key in ("objective/kl", "objective/scores", "objective/entropy"):
        assert second[key] == pytest.approx(first[key], abs=1e-5), key
    assert abs(second["objective/kl"]) < 1e-5


def test_the_published_adapter_holds_what_was_trained(adapters, micro_recipe, tmp_path):
    """SFT, then PPO against a reward model: three adapters on one base, whose weights are in memory once."""
    sft, reward = adapters
    shared = []

    def seen(model, *others):
        shared.append({name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)})
        return setup_optimizer(model, *others)

    setup_optimizer = setup.make_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.ppo.train.make_optimizer", seen)
        folder = of(micro_recipe, tmp_path, f"parent={sft}", "reward=[{model: " + str(reward) + "}]", *QUICK)
    (pointers,) = shared
    base = {
        name.removeprefix("policy.model."): at for name, at in pointers.items() if name.endswith("base_layer.weight")
    }
    critic = {name.removeprefix("critic.body."): at for name, at in pointers.items() if name.startswith("critic.body.")}
    common = [name for name in critic if name in base]
    assert len(common) == 14 and all(critic[name] == base[name] for name in common)
    manifest = read_manifest(folder / "stage.json")
    assert manifest.adapter.stack == ["sft", "ppo"]
    assert manifest.adapter.base.name == "pretrain"
    plain = AutoModelForCausalLM.from_pretrained(manifest.adapter.base.path + "/model")
    found = PeftModel.from_pretrained(plain, folder / "model").eval()
    parent = open_parent(str(folder), tmp_path, {"causal_lm"})
    ours = Model.load(ENGINE, parent, "policy", load_encoder(parent), ModelArguments()).module
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert (found(ids).logits - ours(ids).logits).abs().max() < 1e-5
    state = load_file(folder / "state" / "step-2" / "model.safetensors")
    assert all("lora" in name or name.startswith("critic.head.") for name in state)


def check_shared(beside: Model, policy: Model) -> None:
    """Checks that a reward model has the policy's weights, and beside them its adapter and head alone."""
    own = {p.data_ptr() for p in policy.module.parameters()}
    extra = [name for name, p in beside.module.named_parameters() if p.data_ptr() not in own]
    assert extra and all("lora" in name or name == "score.weight" for name in extra)


def test_a_reward_model_gives_the_same_scores_on_the_policys_weights(adapters, tmp_path):
    sft, reward = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in adapters)
    for policy_parent in (sft, sft.base):
        policy = Model.load(ENGINE, policy_parent, "policy", load_encoder(sft), ModelArguments(), dropout=False)
        base = SharedBase(policy)
        policy.adapt(AdapterConfig(), 1)
        alone = Model.load(ENGINE, reward, "reward", load_encoder(reward), ModelArguments()).freeze()
        beside = base.model(reward, "reward", load_encoder(reward)).freeze()
        assert torch.allclose(score(alone.module, ROWS, 2), score(beside.module, ROWS, 2), atol=1e-5)
        check_shared(beside, policy)


def test_a_critic_on_the_policys_weights_starts_as_the_reward_model(adapters, tmp_path):
    sft, reward = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in adapters)
    policy = Model.load(ENGINE, sft, "policy", load_encoder(sft), ModelArguments(), dropout=False)
    base = SharedBase(policy)
    policy.adapt(AdapterConfig(), 1)
    critic = base.model(reward, "critic", load_encoder(reward), adapter=AdapterConfig(r=3), seed=1)
    alone = Model.load(ENGINE, reward, "reward", load_encoder(reward), ModelArguments())
    assert torch.allclose(score(alone.module, ROWS, 2), score(critic.module, ROWS, 2), atol=1e-5)
    trained = [name for name, p in critic.module.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and all(".default." in name for name in trained)


def test_what_does_not_share_a_base_has_its_own(micro_recipe, adapters, tmp_path):
    sft, _ = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in adapters)
    whole = open_parent(str(load_recipe(micro_recipe).run_dir / "reward"), tmp_path, {"reward_model"})
    policy = Model.load(ENGINE, sft, "policy", load_encoder(sft), ModelArguments(), dropout=False)
    assert SharedBase(policy).model(whole, "reward", load_encoder(whole)) is None


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(advantage, micro_recipe, tmp_path):
    keys = (*QUICK, "train.iterations=3")
    if advantage == "group":
        keys += ("advantage=group", "train.num_generations=4")
    whole = of(micro_recipe, tmp_path / "whole", *keys)
    with dies(Saves, "after_iteration", lambda _, saves, at, *__: at.iteration == 2):
        of(micro_recipe, tmp_path / "cut", *keys)
    again = of(micro_recipe, tmp_path / "cut", *keys)
    assert lines(again) == lines(whole)
    for file in ("model/adapter_model.safetensors", "state/step-3/optimizer.safetensors"):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [("adapter.lora_dropout=0.1", "dropout is off in this stage"), ("train.sync_ref_model=true", "it cannot move")],
)
def test_what_an_adapter_cannot_do_is_refused(override, message, micro_recipe):
    with pytest.raises(RecipeError, match=message):
        load_recipe(micro_recipe, ["ppo.adapter.r=4", f"ppo.{override}"])


def test_both_rates_are_those_of_adapters(micro_recipe):
    config = load_recipe(micro_recipe, ["ppo.adapter.r=4"]).sections["ppo"].config
    assert config.train.learning_rate == 1e-3  # the recipe's own
    assert config.train.critic_learning_rate == pytest.approx(9e-5)


def test_the_adapter_of_a_policy_is_not_that_of_its_critic(adapters, tmp_path):
    sft, _ = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in adapters)
    policy = Model.load(ENGINE, sft, "policy", load_encoder(sft), ModelArguments(), dropout=False)
    base = SharedBase(policy)
    policy.adapt(AdapterConfig(r=2), 1)
    critic = base.model(sft, "critic", load_encoder(sft), adapter=AdapterConfig(r=2), seed=1)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(policy.module.get_parameter(name), critic.module.get_parameter(name))
    assert StoredAdapter.of(sft, base._plain) is not None


@pytest.fixture(scope="module")
def quantised_adapters(micro_recipe, tmp_path_factory):
    """SFT and a reward model on it, both over an NF4 base."""
    root = tmp_path_factory.mktemp("quantised")
    pretrained = load_recipe(micro_recipe).run_dir / "pretrain"
    keys = ("adapter.r=4", "quantization=nf4", "train.max_steps=6")
    sft = of(micro_recipe, root, f"parent={pretrained}", *keys, section="sft")
    return sft, of(micro_recipe, root, f"parent={sft}", *keys, section="reward")


def test_four_roles_share_one_quantised_base(quantised_adapters, micro_recipe, tmp_path):
    """What PPO publishes is what it trained; an interrupted run ends as one that was not; the states hold no base."""
    sft, reward = quantised_adapters
    held = []

    def seen(model, *others):
        held.append({name: p.data_ptr() for name, p in model.named_parameters() if p.dtype == torch.uint8})
        return setup_optimizer(model, *others)

    setup_optimizer = setup.make_optimizer
    keys = (f"parent={sft}", "reward=[{model: " + str(reward) + "}]", *QUICK, "quantization=nf4", "train.iterations=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.ppo.train.make_optimizer", seen)
        whole = of(micro_recipe, tmp_path / "whole", *keys)
    assert len(held[0]) == 14 and all(name.startswith("policy.") for name in held[0])  # the critic's are the same
    found = lines(whole)
    assert abs(next(line["objective/kl"] for line in found if line["step"] == 1)) < 1e-6
    manifest = read_manifest(whole / "stage.json")
    assert manifest.adapter.stack == ["sft", "ppo"] and manifest.adapter.quantization.method == "nf4"
    state = load_file(whole / "state" / "step-3" / "model.safetensors")
    assert all(".default." in name or name.startswith("critic.head.") for name in state)
    with dies(Saves, "after_iteration", lambda _, saves, at, *__: at.iteration == 2):
        of(micro_recipe, tmp_path / "cut", *keys)
    again = of(micro_recipe, tmp_path / "cut", *keys)
    assert lines(again) == found
    for file in ("model/adapter_model.safetensors", "state/step-3/optimizer.safetensors"):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_reference_on_a_quantised_base_is_the_parent(method, quantised_adapters, tmp_path):
    """Also where the parent is an adapter, which the adapter in training is switched off above."""
    sft, _ = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in quantised_adapters)
    parent = sft if method == "nf4" else sft.base
    record = QuantizationRecord(method=method, double_quant=method == "nf4")
    policy = Model.load(
        ENGINE, parent, "policy", load_encoder(parent), ModelArguments(), quantization=record, frozen=True
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = policy.module.eval()(ids).logits
        policy.adapt(AdapterConfig(r=2), 1)
        for name, parameter in policy.module.named_parameters():
            if parameter.requires_grad:
                assert ".default." in name
                parameter.add_(0.1)
        assert (policy.module(ids).logits - before).abs().max() > 1e-2
        with policy.reference(bf16=False).whole() as module:
            assert torch.equal(module(ids).logits, before)
        assert (policy.module(ids).logits - before).abs().max() > 1e-2


def test_a_reward_model_gives_the_same_scores_on_the_policys_quantised_weights(quantised_adapters, tmp_path):
    sft, reward = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in quantised_adapters)
    keys = {"dropout": False, "frozen": True}
    for policy_parent in (sft, sft.base):
        policy = Model.load(
            ENGINE, policy_parent, "policy", load_encoder(sft), ModelArguments(), quantization=sft.quantization, **keys
        )
        base = SharedBase(policy)
        policy.adapt(AdapterConfig(), 1)
        alone = Model.load(ENGINE, reward, "reward", load_encoder(reward), ModelArguments(), **keys).freeze()
        beside = base.model(reward, "reward", load_encoder(reward)).freeze()
        assert torch.allclose(score(alone.module, ROWS, 2), score(beside.module, ROWS, 2), atol=1e-5)
        critic = base.model(reward, "critic", load_encoder(reward), adapter=AdapterConfig(r=3), seed=1)
        assert torch.allclose(score(alone.module, ROWS, 2), score(critic.module, ROWS, 2), atol=1e-5)
        check_shared(beside, policy)


def test_a_base_that_is_quantised_in_another_way_is_not_shared(quantised_adapters, tmp_path):
    sft, reward = (open_parent(str(path), tmp_path, {"causal_lm", "reward_model"}) for path in quantised_adapters)
    policy = Model.load(ENGINE, sft.base, "policy", load_encoder(sft), ModelArguments(), dropout=False)
    assert SharedBase(policy).model(reward, "reward", load_encoder(reward)) is None


def test_the_critics_head_moves_on_a_frozen_body_in_bfloat16():
    """In bfloat16 a step of 3e-6 would be rounded away."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    body = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    critic = Critic(body, torch.float32)
    torch.nn.init.ones_(critic.head.weight)
    optimizer = torch.optim.AdamW([critic.head.weight], lr=3e-6, weight_decay=0)
    values = critic(pad_batch([ROWS[0][:3]], [ROWS[0][3:]], 0, torch.device("cpu")))
    assert values.dtype == torch.float32 and values.shape == (1, 2)
    values.sum().backward()
    optimizer.step()
    assert (critic.head.weight != 1).all()
