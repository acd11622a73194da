"""One loop, several estimators: what holds for all of them, and the guards at work, on a model of 0.2 M parameters."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from handoff.errors import GateError
from handoff.stage import StageDir
from reward.functions import RewardError
from tests.judge_server import graded, pieces, serve
from tests.test_ppo_train import result, steps
from training.recipe import Recipe, RecipeError, load_recipe
from training.run import run_section

GROUPS = ["advantage=group", "train.num_generations=4", "train.num_ppo_epochs=1", "train.num_mini_batches=2"]
VARIANTS = {
    "group": [*GROUPS, "train.kl_in=loss", "train.loss_normaliser=sequence"],
    "dr_grpo": [*GROUPS, "train.scale_rewards=false", "train.loss_normaliser=constant"],
    "gspo": [*GROUPS, "train.policy_loss=gspo", "train.loss_normaliser=sequence", "train.num_ppo_epochs=2"],
    "cispo": [
        *GROUPS,
        "train.policy_loss=cispo",
        "train.cliprange_high=1.0",
        "train.kl_in=loss",
        "train.kl_estimator=k2",
    ],
    "leave_one_out": [
        "advantage=leave_one_out",
        "train.num_generations=4",
        "train.policy_loss=clip_higher",
        "train.cliprange_high=0.28",
    ],
    "global_baseline": ["advantage=global_baseline", "train.policy_loss=dual_clip", "train.entropy_coef=0.01"],
    "global_groups": ["advantage=global_baseline", "train.num_generations=2", "train.gamma=0.9"],
    "vapo": ["train.lam=length_adaptive", "train.critic_lam=1.0", "train.critic_warmup_iterations=1"],
}
slow = pytest.mark.slow


@pytest.fixture
def recipe_of(micro_recipe):
    def load(*overrides: str) -> Recipe:
        return load_recipe(micro_recipe, [f"ppo.{o}" for o in overrides])

    return load


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Reward functions that a user would write."""
    (tmp_path / "toy_rewards.py").write_text(
        "CALLS = 0\n"
        "def longer(prompts, completions, completion_ids, **columns):\n"
        "    return [len(ids) / 8 for ids in completion_ids]\n"
        "def shorter(prompts, completions, completion_ids, **columns):\n"
        "    return [-len(ids) / 8 for ids in completion_ids]\n"
        "def constant(prompts, completions, **columns):\n"
        "    return [0.5 for _ in completions]\n"
        "def of_some(prompts, completions, completion_ids, family, **columns):\n"
        "    return [len(ids) / 8 if f < 'm' else 0.0 for ids, f in zip(completion_ids, family)]\n"
        "def breaks(prompts, completions, **columns):\n"
        "    global CALLS\n"
        "    CALLS += 1\n"
        "    if CALLS > 4:\n"
        "        raise ZeroDivisionError('third iteration')\n"
        "    return [float(len(c) % 3) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("toy_rewards", None)


def run(recipe: Recipe) -> tuple[dict[str, torch.Tensor], list[dict]]:
    run_section(recipe, "ppo")
    return result(recipe.run_dir / "ppo")


@slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_how_a_step_is_cut_changes_nothing(variant, recipe_of):
    weights, lines = run(recipe_of(*VARIANTS[variant], "train.iterations=2"))
    assert all(("loss/value_avg" in line) == (variant == "vapo") for line in steps(lines))
    cut = ["train.per_device_train_batch_size=1", "train.rollout_micro_batch_size=3"]
    other, others = run(recipe_of(*VARIANTS[variant], "train.iterations=2", *cut))
    for a, b in zip(steps(lines), steps(others), strict=True):
        assert a["loss/policy_avg"] == pytest.approx(b["loss/policy_avg"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert max(line["grad_norm"] for line in steps(lines)) > 0
    for name, tensor in weights.items():
        assert torch.allclose(tensor, other[name], atol=1e-4), name


@slow
def test_without_learning_nothing_moves_in_groups(recipe_of):
    _, lines = run(recipe_of(*VARIANTS["gspo"], "train.learning_rate=0", "train.temperature=0.6"))
    for line in steps(lines):
        assert abs(line["val/ratio"] - 1) < 1e-5
        assert line["val/first_ratio_deviation"] < 1e-5
        assert abs(line["objective/kl"]) < 1e-4
        assert line["policy/clipfrac_avg"] == 0


@slow
def test_during_critic_warm_up_the_policy_stands_still(recipe_of):
    weights, lines = run(recipe_of("train.critic_warmup_iterations=4", "guards.keep=last", "train.weight_decay=0.1"))
    parent = load_file(recipe_of().run_dir / "sft" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, parent[name]) for name, tensor in weights.items())
    assert steps(lines)[-1]["lr"] == 0
    assert steps(lines)[-1]["loss/value_avg"] < steps(lines)[0]["loss/value_avg"]


@slow
def test_a_moved_reference_is_nearer(recipe_of):
    fixed = steps(run(recipe_of("train.learning_rate=3e-3", "train.kl_coef=0"))[1])
    moved = ["train.sync_ref_model=true", "train.ref_model_sync_steps=1", "train.ref_model_mixup_alpha=1"]
    lines = steps(run(recipe_of("train.learning_rate=3e-3", "train.kl_coef=0", *moved))[1])
    assert lines[0]["objective/kl"] == fixed[0]["objective/kl"]
    assert fixed[-1]["objective/kl"] > 0.05
    assert all(abs(line["objective/kl"]) < 1e-4 for line in lines)  # the reference is the policy that samples


@slow
def test_groups_without_signal_are_replaced_and_counted(recipe_of, toy):
    reward = 'reward=[{"function": "toy_rewards:of_some"}]'
    quiet = ["train.missing_eos_penalty=0", "guards.max_without_signal=1", "train.iterations=2"]
    _, plain = run(recipe_of(*GROUPS, reward, *quiet))
    _, dynamic = run(recipe_of(*GROUPS, reward, *quiet, "train.dynamic_sampling_rounds=4"))
    assert any(line["frac_reward_zero_std"] > 0 for line in steps(plain))
    assert "sampling/rounds" not in steps(plain)[0]
    for line in steps(dynamic):
        assert 1 <= line["sampling/rounds"] <= 5
        assert (line["sampling/rounds"] > 1) == (line["frac_reward_zero_std"] > 0)
        assert line["sampling/discarded_groups"] >= line["sampling/rounds"] - 1
    assert any(line["sampling/rounds"] > 1 for line in steps(dynamic))


LENGTHS = ['reward=[{"function": "toy_rewards:longer"}]', 'monitor=[{"function": "toy_rewards:shorter"}]']
HACKED = [*LENGTHS, "train.kl_coef=0", "train.learning_rate=3e-3", "train.sample_iterations=1", "train.iterations=12"]
HACKED += ["train.lr_decay=none", "eval_data.0.size=32"]


@slow
def test_over_optimisation_ends_the_run_with_the_best_policy(recipe_of, toy):
    recipe = recipe_of(*HACKED, "train.missing_eos_penalty=0")
    weights, lines = run(recipe)
    manifest = StageDir(recipe.run_dir / "ppo").manifest()
    assert manifest is not None
    looks = {line["step"]: line["eval/monitor"] for line in lines if "eval/monitor" in line}
    kept = manifest.metrics["kept_iteration"]
    assert max(looks) < 12
    assert looks[kept] == max(value for step, value in looks.items() if step > 0)
    state = load_file(recipe.run_dir / "ppo" / "state" / f"step-{kept}" / "model.safetensors")
    assert all(torch.equal(tensor, state[f"policy.{name}"]) for name, tensor in weights.items())
    assert "over-optimisation: since iteration" in manifest.extra["alarms"][0]
    # The published numbers are those of the kept policy, not of the last one.
    line = next(line for line in steps(lines) if line["step"] == kept)
    look = next(line for line in lines if line["step"] == kept and "eval/scores" in line)
    for name in ("objective/scores", "objective/kl", "completions/mean_length"):
        assert manifest.metrics[name] == line[name] != steps(lines)[-1][name]
    for name in ("eval/scores", "eval/kl", "eval/mean_length"):
        assert manifest.metrics[name] == look[name]


@slow
def test_a_rollback_goes_on_from_the_best_policy_with_half_the_rate(recipe_of, toy, capsys):
    more = ["train.missing_eos_penalty=0", "guards.on_overoptimization=rollback"]
    _, lines = run(recipe_of(*HACKED, *more))
    rates = [line["lr"] for line in steps(lines)]
    assert rates[0] == 3e-3 and 1.5e-3 in rates
    back = rates.index(1.5e-3)
    assert "goes on from the policy of iteration" in capsys.readouterr().out
    monitors = [line["eval/monitor"] for line in lines if "eval/monitor" in line]
    assert monitors[back + 1] > monitors[back]  # the first look after it is better than the last before


@slow
def test_warnings_only_where_the_recipe_says_so(recipe_of, toy):
    recipe = recipe_of(*HACKED, "train.missing_eos_penalty=0", "guards.on_overoptimization=warn", "guards.keep=last")
    _, lines = run(recipe)
    manifest = StageDir(recipe.run_dir / "ppo").manifest()
    assert manifest is not None and manifest.extra["alarms"] and manifest.metrics["kept_iteration"] == 12
    assert steps(lines)[-1]["step"] == 12


@slow
def test_the_probe_refuses_before_training(recipe_of, toy):
    constant = 'reward=[{"function": "toy_rewards:constant"}]'
    with pytest.raises(GateError, match="no learning signal"):
        run(recipe_of(constant, "train.missing_eos_penalty=0"))
    with pytest.raises(GateError, match="no learning signal"):  # though answers that are cut off get less
        run(recipe_of(constant, "train.missing_eos_penalty=1"))
    with pytest.raises(GateError, match=r"truncation: before training, .* Raise train.max_completion_length"):
        run(recipe_of("train.max_completion_length=2", "guards.max_truncated=0.5"))


@slow
def test_a_reward_that_breaks_is_named_and_the_state_before_it_is_kept(recipe_of, toy):
    broken = ['reward=[{"function": "toy_rewards:breaks"}]', "train.save_iterations=1", "guards.max_without_signal=1"]
    recipe = recipe_of(*broken)
    with pytest.raises(RewardError, match=r"reward `breaks` raised ZeroDivisionError: third iteration"):
        run_section(recipe, "ppo")
    assert list((recipe.run_dir / "ppo" / "state").glob("step-*"))
    assert not (recipe.run_dir / "ppo" / "stage.json").exists()


@slow
def test_a_missing_column_is_refused_before_training(recipe_of):
    with pytest.raises(RewardError, match=r"lacks|column"):
        run_section(recipe_of('reward=[{"function": "exact_match"}, {"function": "ifeval"}]'), "ppo")


@slow
def test_a_judge_rewards_and_its_costs_are_logged(recipe_of, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(lambda body: graded(1 + len(pieces(body)["answer"]) % 10)) as (_, url):
        options = {"base_url": url, "model": "judge-1", "price_per_million_input": 10.0}
        reward = json.dumps([{"function": "judge", "args": options}])
        lines = steps(run(recipe_of(f"reward={reward}", "train.iterations=2"))[1])
    assert all(0 <= line["rewards/judge"] <= 1 for line in lines)
    assert lines[1]["judge/judge-1/rows"] == 16
    assert lines[1]["judge/judge-1/cost"] == pytest.approx(lines[1]["judge/judge-1/input_tokens"] * 1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["advantage=group"], "advantage group compares answers to one prompt: set train.num_generations to 2 or more"),
        (["advantage=leave_one_out"], "set train.num_generations to 2 or more"),
        ([*GROUPS, "train.num_generations=3"], "rollout_batch_size 16 is not a multiple of num_generations 3"),
        ([*GROUPS, "train.lam=0.9"], "`lam` is not read unless advantage is gae"),
        ([*GROUPS, "critic=reward"], "`critic` is not read unless advantage is gae"),
        (["train.scale_rewards=false"], "`scale_rewards` is not read unless advantage is group"),
        (["train.kl_in=loss", "train.kl_estimator=k1"], "k1 in the loss has a gradient of mean zero"),
        (["train.cliprange_high=0.3"], "`cliprange_high` is not read unless policy_loss is clip_higher, cispo or gspo"),
        (["train.policy_loss=cispo"], "policy_loss cispo needs `cliprange_high`"),
        (["train.policy_loss=dual_clip", "train.dual_clip=1.1"], "dual_clip 1.1 is not above 1 + cliprange 0.2"),
        (["train.overlong_buffer=25"], "overlong_buffer 25 exceeds max_completion_length 24"),
        (["train.dynamic_sampling_rounds=1"], "dynamic_sampling_rounds needs groups"),
        (["train.ref_model_sync_steps=5"], "is not read unless sync_ref_model is true"),
        (["train.kl_target=5.0"], "`kl_target` is not read unless kl_controller is adaptive"),
        (['monitor=[{"function": "world_gold"}]', "eval_data=[]"], "name them under eval_data"),
        (["train.lam=1.5"], "lam is 1.5; it lies between 0 and 1"),
        (["train.top_p=0.9"], "ppo.train.top_p: training samples from the whole distribution"),
        (
            ['monitor=[{"model": "reward", "reencode": true}]'],
            "reward is read with `reencode` in one entry and without it in another",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(tmp_path, overrides, said):
    from tests.conftest import MICRO

    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(root=tmp_path))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"ppo.{o}" for o in overrides])
    assert said in str(caught.value)


def test_every_estimator_and_loss_can_be_combined(tmp_path):
    from tests.conftest import MICRO

    path = Path(tmp_path / "micro.yaml")
    path.write_text(MICRO.format(root=tmp_path))
    for advantage, loss, normaliser in itertools.product(
        ("gae", "group", "leave_one_out", "global_baseline"),
        ("clip", "clip_higher", "dual_clip", "gspo", "cispo"),
        ("token", "sequence", "constant"),
    ):
        keys = [f"advantage={advantage}", f"train.policy_loss={loss}", f"train.loss_normaliser={normaliser}"]
        if loss in ("clip_higher", "cispo"):
            keys.append("train.cliprange_high=0.3")
        load_recipe(path, [f"ppo.{key}" for key in (*keys, "train.num_generations=4")])
