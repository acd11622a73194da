"""`baton init`: from a model and a file to a recipe that is planned, rehearsed and run."""

import json
import re
from pathlib import Path

import pytest

from baton.init import init, methods
from baton.plan import plan
from baton.runner import run_pipeline
from handoff.errors import UserError
from tests.rehearsing import rehearsed, start_of
from tests.test_families import publish
from training.recipe import load_recipe

pytestmark = pytest.mark.slow
QUESTIONS = [f"Sort the words: pear{n}, apple" for n in range(90)]
DATA = {
    "chats": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "apple"}]}
              for q in QUESTIONS],
    "alpaca": [{"instruction": q, "input": "", "output": "apple"} for q in QUESTIONS],
    "pairs": [{"prompt": q, "chosen": "apple, pear", "rejected": "pear"} for q in QUESTIONS],
    "maths": [{"question": q, "answer": f"It is so. #### {n}"} for n, q in enumerate(QUESTIONS)],
    "checked": [{"prompt": q, "instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
                for q in QUESTIONS],
    "arc": [
        {"question": q, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"} for q in QUESTIONS
    ],
    "documents": [{"text": q} for q in QUESTIONS],
}  # fmt: skip
CHAINS = {
    "sft": (["chats"], ["sft", "evaluate"]),
    "dpo": (["chats", "pairs"], ["sft", "dpo", "evaluate"]),
    "grpo": (["maths"], ["sft", "grpo", "evaluate"]),
    "rlhf": (["pairs"], ["sft", "reward", "ppo", "evaluate"]),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with a model and a file of each kind."""
    monkeypatch.chdir(tmp_path)
    publish(tmp_path / "model", "Qwen3")
    for name, rows in DATA.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def files(*names: str) -> list[str]:
    return [f"{name}.jsonl" for name in names]


def test_the_methods_are_those_that_the_stages_declare():
    assert set(methods()) == set(CHAINS)


@pytest.mark.parametrize("method", CHAINS)
def test_a_recipe_is_written_planned_and_rehearsed(here, method):
    data, sections = CHAINS[method]
    path = init("model", files(*data), method, None)
    assert path == Path(f"model-{method}.yaml")
    assert list(load_recipe(path).sections) == sections
    held = [line for line in path.read_text().split("stages:")[1].splitlines() if re.match(r"\s+\w+: ", line)]
    silent = [line for line in held if "#" not in line and not line.startswith("    stage:")]
    assert silent == [], "every value has its reason"
    assert all(section.fits for section in plan(path).sections)
    assert rehearsed(path) == 0


def test_a_recipe_is_run_as_it_is_written(here, monkeypatch):
    monkeypatch.setattr("baton.runner.start_of", start_of)
    recipe = load_recipe(init("model", files("alpaca"), None, Path("own.yaml")), ["sft.train.max_steps=2"])
    assert run_pipeline(recipe, ["sft"], (), None, dry_run=False) == 0
    assert (here / "runs" / "model-sft" / "sft" / "stage.json").is_file()


@pytest.mark.parametrize(
    ("data", "chosen"),
    [(["chats"], "sft"), (["alpaca"], "sft"), (["pairs"], "dpo"), (["maths"], "grpo"), (["checked"], "grpo")],
)
def test_the_method_follows_from_the_data(here, data, chosen):
    assert init("model", files(*data), None, None).name == f"model-{chosen}.yaml"


def test_the_reward_is_one_that_reads_the_columns(here):
    assert "{function: ifeval}" in init("model", files("checked"), None, None).read_text()
    assert "{function: math_equal}" in init("model", files("maths"), "grpo", Path("maths.yaml")).read_text()


def test_a_large_model_gets_an_adapter_and_ten_times_the_rate(here):
    keys = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32}
    keys |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    (here / "large").mkdir()
    (here / "large" / "config.json").write_text(json.dumps(keys | {"max_position_embeddings": 8192}))
    recipe = load_recipe(init("./large", files("chats", "pairs"), "dpo", None))
    sft, dpo = recipe.sections["sft"].config, recipe.sections["dpo"].config
    assert (sft.adapter.r, sft.adapter.lora_alpha, sft.train.learning_rate) == (32, 32, 2e-4)
    assert (dpo.adapter.r, dpo.train.learning_rate, dpo.train.gradient_checkpointing) == (16, 1e-5, True)


MISTAKES = {
    "no file": (["nothing.jsonl"], None, "nothing.jsonl: no such file or folder"),
    "no method": (["chats.jsonl"], "dop", "--method dop: there are .*dpo"),
    "no pairs": (["chats.jsonl"], "dpo", "--method dpo: these data have no rows for it"),
    "nothing to check": (["chats.jsonl"], "grpo", "--method grpo: these data have no rows"),
    "no answers": (["checked.jsonl"], "sft", "--method sft: these data have no rows"),
    "choices": (["arc.jsonl"], None, "holds questions with answers to choose from"),
    "documents": (["documents.jsonl"], None, "holds documents, for pretraining"),
}


@pytest.mark.parametrize(("data", "method", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_what_cannot_be_written_is_refused(here, data, method, message):
    with pytest.raises(UserError, match=message):
        init("model", data, method, None)
    assert list(here.glob("*.yaml")) == []


def test_a_model_that_is_not_there_is_refused(here):
    with pytest.raises(UserError, match=r"\./nothing: no such directory"):
        init("./nothing", files("chats"), None, None)


def test_no_file_is_overwritten(here):
    path = init("model", files("chats"), None, None)
    before = path.read_bytes()
    with pytest.raises(UserError, match="is not overwritten"):
        init("model", files("pairs"), None, path)
    assert path.read_bytes() == before


def test_few_rows_are_all_trained_on(here):
    lines = (here / "chats.jsonl").read_text().splitlines(keepends=True)
    (here / "few.jsonl").write_text("".join(lines[:20]))
    assert list(load_recipe(init("model", files("few"), None, None)).sections) == ["sft"]
