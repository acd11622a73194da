"""The benchmarks' harness: turns of two processes, the material for both sides, and the form of rows."""

import json
import statistics
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks import adapter_learning, adapters, checkpoint_cost, real_model, rl, rows, scaling
from benchmarks.rl_setup import VOCABULARY, make, recipe, score
from benchmarks.table import Row, in_turns, report
from benchmarks.turns import Worker, WorkerError
from data.encode import Encoder
from handoff.parent import open_parent
from training.recipe import load_recipe

FAKE = """
    import sys
    sys.path.insert(0, {folder!r})
    from turns import Turns
    turns = Turns()
    print("what a library prints")
    for update in range(4):
        turns.done({{"update": update}})
    raise RuntimeError("out of memory")
"""


@pytest.fixture
def fake(root, tmp_path):
    """A worker that answers four times and then fails."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE.format(folder=str(root / "benchmarks"))))
    return [sys.executable, str(script)]


def test_a_worker_answers_one_request_at_a_time_and_nothing_else_comes_between(fake, tmp_path):
    worker = Worker(fake, 1, tmp_path / "log", tmp_path)
    answers = [worker.last, worker.turn(), worker.turn()]
    worker.close()
    assert [answer["update"] for answer in answers] == [0, 1, 2]
    assert all(answer["wall"] >= 0 and answer["cpu"] >= 0 for answer in answers)
    assert "what a library prints" in (tmp_path / "log").read_text()


def test_a_worker_that_ends_is_an_error_with_its_output(fake, tmp_path):
    worker = Worker(fake, 1, tmp_path / "log", tmp_path)
    with pytest.raises(WorkerError, match="out of memory"):
        for _ in range(4):
            worker.turn()
    worker.close()


def test_sides_take_turns_and_the_ratio_is_the_median_of_pairs():
    order = []

    def side(name, rates):
        left = iter(rates)

        def run():
            order.append(name)
            return next(left)

        return run

    row = in_turns("x", "answers/s", side("a", [99, 2, 30, 8]), side("b", [99, 1, 10, 8]), turns=3)
    assert order == ["a", "b"] * 4
    assert row == Row(row="x", ours=8, peer=8, unit="answers/s", ratio=2.0)


def test_rows_are_written_in_the_form_that_every_benchmark_has(tmp_path, capsys):
    rows = [Row(row="x", ours=3.0, peer=2.0, unit="answers/s", ratio=1.5)]
    report(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert "1.50×" in capsys.readouterr().out


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return folder, make(folder, "5M", (8, 32), 64, 1 / 32)


def test_prompts_have_the_requested_lengths(material):
    _, made = material
    encoder = Encoder.from_pretrained(made.policy)
    from data.records import Message

    texts = [json.loads(line)["prompt"] for line in made.prompts.read_text().splitlines()]
    lengths = [len(encoder.prompt((Message("user", text),))) for text in texts]
    assert min(lengths) >= 8 and max(lengths) <= 32 and statistics.pstdev(lengths) > 4


@torch.no_grad()
def test_answers_end_with_the_requested_chance_and_only_at_stop_tokens(material):
    _, made = material
    model = AutoModelForCausalLM.from_pretrained(made.policy, dtype=torch.float32)
    ids = torch.randint(16, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    chances = model(ids).logits.softmax(-1)
    assert chances[..., 1].mean().item() == pytest.approx(1 / 32, rel=0.15)
    assert chances[..., 7].max().item() < 1e-6


def test_both_sides_read_the_same_material(material):
    folder, made = material
    path = recipe(folder, made, rl.our_section(rl.work("ppo", False), made.reward, True))
    section = load_recipe(path).sections["rl"]
    assert section.config.train.rollout_batch_size == rl.ANSWERS and section.config.train.bf16 is False
    assert open_parent(str(made.reward), folder, {"reward_model"}).kind == "reward_model"
    assert open_parent(str(made.policy), folder, {"causal_lm"}).kind == "causal_lm"


def test_grpo_is_a_section_that_the_stage_accepts(material):
    folder, made = material
    path = recipe(folder, made, rl.our_section(rl.work("grpo", True), made.reward, False))
    config = load_recipe(path).sections["rl"].config
    assert config.advantage == "group" and config.train.num_generations == rl.GENERATIONS


@pytest.mark.parametrize("commands", [adapters.sft_commands, adapters.grpo_commands])
def test_both_sides_of_the_adapters_benchmark_train_the_same_one(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "SIZE", "5M")
    ours, peer = commands(tmp_path, True)
    config = load_recipe(Path(ours[-2])).sections["rl"].config
    settings = json.loads(peer[-1])
    assert {name: getattr(config.adapter, name) for name in settings["adapter"]} == settings["adapter"]
    train = config.train
    assert train.per_device_train_batch_size == settings["micro_batch"] and train.bf16 is settings["arguments"]["bf16"]
    ours_rows = train.rollout_batch_size if commands is adapters.grpo_commands else train.global_batch_size
    assert ours_rows == settings["rows"]


def test_the_chats_of_the_adapters_benchmark_have_the_lengths_that_it_names(tmp_path):
    rows = [json.loads(line) for line in adapters.chats(tmp_path / "rows.jsonl", VOCABULARY).read_text().splitlines()]
    lengths = [len(row["prompt"].split()) + len(row["completion"].split()) for row in rows]
    assert (min(lengths), max(lengths), len(rows)) == (adapters.SHORTEST, adapters.LONGEST, adapters.CHATS)


def test_the_free_reward_is_in_range_and_differs_between_answers():
    assert score([], ["w2048 w3", "w17", ""]) == [0.5, 17 / VOCABULARY, 0.0]


def test_operations_equal_a_count_by_hand():
    """5M: 6 layers of 4·256² + 3·256·688 + 2·64·256 multiplications a token, twice (policy, critic), and the head."""
    layer = 4 * 256 * 256 + 3 * 256 * 688 + 2 * 64 * 256
    by_hand = 6 * (2 * 16 * 64 * 6 * layer + 16 * 32 * 256 * 4096)
    assert scaling.training_operations(scaling.BASE) == by_hand


def test_phases_leave_out_the_enclosing_iteration():
    assert scaling.phases({"time/train": 1.0, "time/iteration": 3.0, "wall": 3.1}) == {"train": 1.0}


def test_step_time_excludes_saves():
    clock = checkpoint_cost.Clock(steps=[0.0, 5.0, 6.0, 7.5, 8.5], spent={"save": [(6.2, 6.7), (9.0, 9.3)]})
    assert clock.step() == pytest.approx(1.0)  # the first span is a warm-up; half a second of 6.0 to 7.5 was a save
    assert clock.seconds("save") == pytest.approx(0.4) and clock.total("save") == pytest.approx(0.8)


def test_the_tiny_recipes_save_intervals(root):
    recipe = load_recipe(root / "recipes" / "tiny.yaml")
    found = {name: checkpoint_cost.interval(recipe, name) for name in checkpoint_cost.SECTIONS}
    assert (found["pretrain"], found["sft"], found["reward"]) == (120, 65, 25)
    assert found["ppo"] == pytest.approx(
        1 / (1 / 3 + 1 / 10)
    )  # every third iteration, and each evaluation may be the best


@pytest.mark.slow
def test_state_costs_are_measured_on_a_saved_and_resumed_state(tmp_path, capsys):
    saving, resuming = checkpoint_cost.growth(tmp_path, "5M")
    assert saving["row"] == "checkpoint_save_5M" and resuming["row"] == "checkpoint_resume_5M"
    assert all(row["unit"] == "MB/s" and row["ours"] > 0 and row["peer"] > 0 for row in (saving, resuming))
    assert "hash" in capsys.readouterr().out


def test_chats_have_the_size_that_was_asked_for_and_are_a_section_that_the_stage_accepts(material, tmp_path):
    _, made = material
    rows.write_chats(tmp_path / "chats.jsonl", 0.1)
    assert 1e5 <= (tmp_path / "chats.jsonl").stat().st_size < 1.05e5
    config = load_recipe(rows.recipe(tmp_path, made.policy, tmp_path / "chats.jsonl")).sections["sft"].config
    assert config.train.max_steps == 4 and config.packing is False


@pytest.mark.slow
def test_starts_are_measured_and_the_second_one_reads_what_the_first_one_wrote(tmp_path, capsys):
    rows.main(tmp_path / "rows.json", sizes=(0.1, 0.4))
    growth, second = json.loads((tmp_path / "rows.json").read_text())
    assert growth["row"] == "rows_growth" and growth["peer"] == 300 and growth["ours"] >= 1
    assert second["row"] == "rows_second_start" and second["ours"] > 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "first" in line or "second " in line]
    assert [line[1] for line in table[:2]] == [table[0][1]] * 2 and int(table[2][1]) > int(table[0][1]) > 50


def test_adapters_are_compared_from_the_same_parent_at_ten_times_the_rate(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(adapter_learning.recipe(1)))
    found = load_recipe(path)
    for name in adapter_learning.GAINS:
        whole, lora = found.sections[name], found.sections[f"{name}_lora"]
        assert (lora.stage, lora.parents) == (whole.stage, whole.parents)
        assert lora.config.train.learning_rate == pytest.approx(10 * whole.config.train.learning_rate)
        same = {"adapter", "train"}
        assert {k: v for k, v in lora.resolved.items() if k not in same} == {
            k: v for k, v in whole.resolved.items() if k not in same
        }
        assert {name, f"{name}_lora"} <= set(found.sections["evaluate"].config.models)


def test_the_numbers_of_a_real_model_are_those_of_its_evaluations(tmp_path):
    """Every section of the table is one that its recipe evaluates together with its parent, by that metric."""
    sections = load_recipe(real_model.RECIPE).sections
    for name, (where, task, metric, _) in real_model.NUMBERS.items():
        config = sections[where].config
        assert {name, sections[name].parents["parent"]} <= {*config.models}
        (found,) = [one for one in config.tasks if one.name == task]
        assert metric in found.measured_on()
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    changed = {"evaluate": ("sft", "dpo", "ppo", "grpo"), "numbers": ("grpo",)}
    for where, names in changed.items():
        metrics = dict.fromkeys(("reference_bits_per_byte", "reward", "numeric_match_sampled", "accuracy"), estimate)
        task = {
            "metrics": dict.fromkeys(("base", *names), metrics),
            "changes": {name: {"over": "base", "metrics": metrics} for name in names},
        }
        results = {"tasks": dict.fromkeys(("instructions", "arithmetic", "arc_easy"), task)}
        (tmp_path / where).mkdir()
        (tmp_path / where / "results.json").write_text(json.dumps(results))
    found = real_model.numbers(tmp_path)
    assert [row[0] for row in found] == [*real_model.NUMBERS] * 2
    assert all(row[2:] == (estimate, estimate, estimate) for row in found)
