"""The policy-gradient stage with vLLM as its engine, against the stand-in server."""

import json

import pytest

from handoff.errors import GateError
from rollout.errors import RolloutError
from tests.fake_vllm import FakeVLLM, free_port
from tests.test_ppo_train import result, run_section, steps
from training.recipe import load_recipe

pytestmark = pytest.mark.slow
DIFFERENCE = "sampling/sampling_logp_difference/mean"


@pytest.fixture
def served(micro_recipe):
    """The recipe whose policy a server serves, and the server."""
    model_dir = load_recipe(micro_recipe).run_dir / "sft" / "model"
    with FakeVLLM(model_dir, free_port()) as fake:
        vllm = json.dumps(
            {"base_url": fake.url, "dtype": "float32", "retries": 1, "retry_wait": 0.1, "start_timeout": 2}
        )
        yield lambda *more: load_recipe(micro_recipe, [f"ppo.vllm={vllm}", *(f"ppo.{key}" for key in more)]), fake


def test_it_trains_on_answers_of_the_weights_that_it_has_just_made(served):
    recipe_of, _ = served
    recipe = recipe_of("train.importance_sampling=token")
    run_section(recipe, "ppo")
    lines = steps(result(recipe.run_dir / "ppo")[1])
    assert all(line[DIFFERENCE] < 1e-5 for line in lines)  # stale weights would show
    assert lines[-1]["objective/kl"] > 0.01
    assert all(line["val/first_ratio_deviation"] < 1e-5 for line in lines)


def test_an_engine_that_leaves_tokens_out_is_stopped_by_name(served):
    recipe_of, fake = served

    def renormalised(body, answer):  # as top-p would: every token likelier than the trainer finds it
        logprobs = answer["choices"][0]["logprobs"]
        logprobs["token_logprobs"] = [value / 2 for value in logprobs["token_logprobs"]]
        return answer

    fake.alter = renormalised
    with pytest.raises(GateError, match="top-p, top-k or min-p are on"):
        run_section(recipe_of(), "ppo")


def test_an_engine_that_dies_in_the_middle_costs_no_state(served):
    recipe_of, fake = served
    recipe = recipe_of("train.save_iterations=1", "train.iterations=8")
    metrics = recipe.run_dir / "ppo" / "metrics.jsonl"

    def dies(body, answer):
        if metrics.exists() and '"episode": 48' in metrics.read_text():
            fake.die()
        return answer

    fake.alter = dies
    with pytest.raises(RolloutError):
        run_section(recipe, "ppo")
    assert (recipe.run_dir / "ppo" / "state" / "step-3").is_dir()
    fake.alter = lambda body, answer: answer
    fake.start()
    run_section(recipe, "ppo")
    lines = steps(result(recipe.run_dir / "ppo")[1])
    assert [line["step"] for line in lines] == list(range(1, 9))
