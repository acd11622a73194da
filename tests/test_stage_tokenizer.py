"""The tokenizer stage: lossless, deterministic, with the pipeline's special tokens, template and stop ids."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import FileSource, WorldSource
from data.encode import Encoder
from data.records import Chat, Message, Prompt, Text
from data.template import CHAT_TEMPLATE, SPECIAL_TOKENS
from handoff.contract import read_tokenizer
from handoff.stage import StageDir
from stages.tokenizer.train import wanted
from tests.stage_chain import chain, runs
from training.recipe import load_recipe
from training.run import run_section


@pytest.fixture(scope="module")
def folder():
    chain()
    return runs() / "tiny" / "tokenizer" / "model"


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.from_pretrained(folder)


def train(output, *overrides):
    recipe = load_recipe(chain(), [f"output_root={output}", *(f"tokenizer.{o}" for o in overrides)])
    run_section(recipe, "tokenizer")
    return recipe.run_dir / "tokenizer"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_round_trips_byte_for_byte(encoder, text):
    ids = encoder.document(text)
    assert encoder.decode(ids[:-1]) == text and ids[-1] == encoder.eos_id


def test_special_tokens_have_the_first_ids_and_the_template_is_the_pipelines(folder, encoder):
    assert [encoder.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(
        range(len(SPECIAL_TOKENS))
    )
    assert encoder.tokenizer.chat_template == CHAT_TEMPLATE
    record = read_tokenizer(folder)
    assert record.stop_ids == sorted(encoder.stop_ids)
    assert (record.bos_id, record.eos_id, record.pad_id) == (encoder.bos_id, encoder.eos_id, encoder.pad_id)
    assert record.vocab_size == encoder.vocab_size
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(stops) == sorted(encoder.stop_ids)
    # The template renders what the encoder encodes.
    messages = [Message("user", "hi 12"), Message("assistant", "Hello!")]
    rendered = encoder.tokenizer.apply_chat_template([{"role": m.role, "content": m.content} for m in messages])
    assert rendered["input_ids"] == encoder.chat(messages)[0]


def test_the_same_texts_give_the_same_file(tmp_path):
    one, two = (train(tmp_path / name) for name in ("one", "two"))
    assert (one / "model" / "tokenizer.json").read_bytes() == (two / "model" / "tokenizer.json").read_bytes()
    assert StageDir(one).manifest().fingerprint == StageDir(two).manifest().fingerprint


def test_digits_are_single_tokens_unless_told_otherwise(encoder, tmp_path):
    def tokens(encoder, text):
        return [encoder.decode([i]) for i in encoder.document(text)[:-1]]

    assert [t for t in tokens(encoder, "Ann has 42 balls, 1989.") if t.strip().isdigit()] == list("421989")
    folder = train(tmp_path, "split_digits=false", "vocab_size=800") / "model"
    joined = tokens(Encoder.from_pretrained(folder), "Ann has 42 balls.")
    assert any(token.strip() == "42" for token in joined)


def test_metrics_count_bytes_per_token_on_held_out_text(tmp_path, capsys):
    folder = train(tmp_path, "vocab_size=2000")
    metrics = StageDir(folder).manifest().metrics
    assert metrics["eval_bytes_per_token"] > 2 and metrics["train_bytes_per_token"] > 2
    assert metrics["vocab_size"] < 2000
    assert f"the texts give {metrics['vocab_size']} entries, not 2000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (WorldSource(source="world", kind="documents"), Text),
        (WorldSource(source="world", kind="chats"), Chat),
        (WorldSource(source="world", kind="preferences"), Chat),
        (WorldSource(source="world", kind="prompts"), Prompt),
        (FileSource(source="file", path="a.txt"), Text),
        (FileSource(source="file", path="a.txt.gz"), Text),
        (FileSource(source="file", path="a.jsonl", format="text"), Text),
        (FileSource(source="file", path="a.jsonl"), Chat),
        (FileSource(source="file", path="a.jsonl", format="preference"), Chat),
    ],
)
def test_a_source_is_read_as_its_kind_of_record(source, kind):
    assert wanted(source) is kind
