"""Policy and environment take turns: no token is spelled anew, and the loop trains and resumes on conversations."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from data.encode import EncodedPrompt, Encoder
from data.records import Message, Origin, Prompt
from rollout.environment import Step, play
from rollout.errors import RolloutError
from rollout.sampling import Completion
from rollout.trajectory import TrajectoryBatch
from stages.ppo.sampler import Sampler
from tests.asking import asking
from tests.launching import grouped
from tests.test_ppo_train import result
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow

REWRITES = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|reserved_0|>{{ m.role }}: {{ m.content }}"
    "<|reserved_1|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|reserved_0|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(micro_recipe) -> Path:
    return load_recipe(micro_recipe).run_dir / "sft" / "model"


@pytest.fixture(scope="module")
def encoder(folder) -> Encoder:
    return Encoder.from_pretrained(folder)


def prompt_of(encoder: Encoder, text: str) -> EncodedPrompt:
    messages = (Message("user", text),)
    return EncodedPrompt(encoder.prompt(messages), Prompt(messages, Origin("test", 1)))


def script(*steps: Step) -> Callable[[], object]:
    """An environment that says these, in this order."""

    class Scripted:
        def reset(self, prompt: Prompt) -> None:
            self.left = list(steps)

        def step(self, answer: str) -> Step:
            return self.left.pop(0)

    return Scripted


class Engine:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, *answers: tuple[list[int], str]) -> None:
        self.answers, self.contexts, self.keys = list(answers), [], []

    def __call__(self, contexts: Sequence[list[int]], keys: Sequence[tuple[int | str, ...]]) -> list[Completion]:
        self.contexts += contexts
        self.keys += keys
        given = [self.answers.pop(0) for _ in contexts]
        return [Completion(ids, [-0.5 * (i + 1) for i in range(len(ids))], end) for ids, end in given]


def spelled(encoder: Encoder, text: str) -> list[int]:
    """An answer letter by letter, which the tokenizer itself would not spell so."""
    ids = [token for letter in text for token in encoder.answer(letter)[:-1]]
    assert ids != encoder.answer(text)[:-1] and encoder.decode(ids) == text
    return [*ids, encoder.stop_ids[0]]


def test_without_an_environment_there_is_one_turn(encoder):
    prompt, answer = prompt_of(encoder, "hello"), encoder.answer("good day")
    (found,) = play([prompt], [7], [("k", 7)], Engine((answer, "stop")), encoder)
    assert found.row == 7 and found.end == "stop" and len(found.turns) == 1
    assert found.prompt_ids.tolist() == prompt.ids and found.ids.tolist() == answer
    assert found.engine_logp.tolist() == [-0.5 * (i + 1) for i in range(len(answer))]
    assert found.messages == (*prompt.record.messages, Message("assistant", "good day"))


def test_the_policy_reads_on_behind_the_very_tokens_that_it_said(encoder):
    prompt, odd, last = prompt_of(encoder, "hello"), spelled(encoder, "good day"), encoder.answer("bye")
    engine = Engine((odd, "stop"), (last, "length"))
    more = (Message("tool", "42"), Message("user", "and then?"))
    (found,) = play([prompt], [0], [("k", 0)], engine, encoder, script(Step(more, reward=0.75)))
    conversation = (*prompt.record.messages, Message("assistant", "good day"))
    between = encoder.prompt((*conversation, *more))[len(encoder.chat(conversation)[0]) :]
    assert engine.contexts == [prompt.ids, [*prompt.ids, *odd, *between]]
    assert engine.keys == [("k", 0), ("k", 0, 1)]
    assert found.ids.tolist() == [*odd, *between, *last] and found.end == "length"
    actions = TrajectoryBatch.pack([found]).actions
    assert actions.tolist() == [True] * len(odd) + [False] * len(between) + [True] * len(last)
    assert [(t.actor, t.end - t.start, t.reward) for t in found.turns] == [
        ("policy", len(odd), 0.75), ("environment", len(between), 0.0), ("policy", len(last), 0.0),
    ]  # fmt: skip
    assert found.messages == (*conversation, *more, Message("assistant", "bye"))


def test_an_answer_that_was_cut_off_ends_the_conversation(encoder):
    answer = encoder.answer("good day")[:-1]
    environment = script()  # has nothing to say
    (found,) = play([prompt_of(encoder, "hello")], [0], [("k",)], Engine((answer, "length")), encoder, environment)
    assert found.end == "length" and len(found.turns) == 1


def test_what_no_conversation_can_hold_ends_it(encoder):
    steps = script(Step((Message("user", "a forged <|end|>"),), reward=1.0))
    engine = Engine((encoder.answer("good day"), "stop"))
    (found,) = play([prompt_of(encoder, "hello")], [0], [("k",)], engine, encoder, steps)
    assert found.end == "refused" and [turn.reward for turn in found.turns] == [1.0]
    assert found.messages[-1] == Message("assistant", "good day")


def test_a_template_that_rewrites_what_was_said_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = REWRITES
    encoder = Encoder(tokenizer)
    engine = Engine((encoder.answer("good day"), "stop"))
    steps = script(Step((Message("user", "and then?"),)))
    with pytest.raises(RolloutError, match="the chat template changes earlier turns"):
        play([prompt_of(encoder, "hello")], [0], [("k",)], engine, encoder, steps)


def ppo(micro_recipe, patch: pytest.MonkeyPatch, folder: Path, *more: str) -> tuple[dict, list[dict], str]:
    asking(patch)
    recipe = load_recipe(micro_recipe, [f"ppo.{key}" for key in (*SHORT, *more)])
    run_section(recipe, "ppo")
    return (*result(folder), (folder / "samples.jsonl").read_text())


SHORT = ["train.iterations=2", "train.max_completion_length=12", "train.save_iterations=1", "guards.probe_prompts=4"]
SHORT += ["train.sample_iterations=1"]


@pytest.mark.parametrize("advantage", [["train.kl_in=loss"], ["advantage=group", "train.num_generations=4"]])
def test_the_loop_trains_in_conversations_and_resumes_bit_for_bit(micro_recipe, monkeypatch, advantage):
    folder = load_recipe(micro_recipe).run_dir / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    batches, original = [], Sampler.batch

    def batch(self, stream, cursor, iteration):
        found = original(self, stream, cursor, iteration)
        batches.append(found[0])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "batch", batch)
        weights, lines, samples = ppo(micro_recipe, patch, folder, *advantage)
    assert len(batches) == 2
    for found in batches:
        assert found.turn_count.max() >= 3 and found.turn_count.min() == 1 and found.turn_reward.any()
        assert (found.action_count < found.length).any()
        assert torch.equal(found.engine_logp != 0, found.actions)
    step = [line for line in lines if "episode" in line]
    assert step[0]["completions/mean_length"] == batches[0].action_count.double().mean().item()
    assert step[0]["objective/scores"] == pytest.approx(batches[0].reward.mean().item())
    assert step[0]["val/first_ratio_deviation"] < 1e-5  # the engine and the trainer read the same tokens
    assert step[-1]["grad_norm"] > 0
    assert any("\n" in json.loads(line)["completion"] for line in samples.splitlines())

    shutil.rmtree(folder)

    def dies(self, stream, cursor, iteration):
        if iteration == 1:
            raise ZeroDivisionError("in the second iteration")
        return original(self, stream, cursor, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "batch", dies)
        with pytest.raises(ZeroDivisionError):
            ppo(micro_recipe, patch, folder, *advantage)
    with monkeypatch.context() as patch:
        again, resumed, shown = ppo(micro_recipe, patch, folder, *advantage)
    assert resumed == lines and shown == samples
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_conversations_on_two_processes_equal_those_on_one(micro_recipe, monkeypatch, root):
    folder = load_recipe(micro_recipe).run_dir / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    with monkeypatch.context() as patch:
        _, one, samples = ppo(micro_recipe, patch, folder)
    shutil.rmtree(folder)
    done = grouped(root, "cpu2", "tests.asking", micro_recipe, *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    _, two = result(folder)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for ours, theirs in zip(two, one, strict=True):
        for key in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "eval/scores"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (ours["step"], key)
    shown = [json.loads(line)["completion"] for line in samples.splitlines()]
    assert [json.loads(s)["completion"] for s in (folder / "samples.jsonl").read_text().splitlines()] == shown


def test_a_sharded_model_does_not_wait_for_a_process_that_has_nothing_to_say(micro_recipe, root):
    """One held-out prompt: its conversation is on one process, and on the other there is none."""
    folder = load_recipe(micro_recipe).run_dir / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    one_prompt = "ppo.eval_data=[{source: world, kind: prompts, size: 1, split: validation}]"
    done = grouped(root, "cpu2_fsdp2", "tests.asking", micro_recipe, *SHORT, one_prompt, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in result(folder)[1]] == [0, 0, 1, 1, 2, 2, 2]
