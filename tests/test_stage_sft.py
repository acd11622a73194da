"""The SFT stage: supervised tokens, packing, answers that stop, and what it refuses."""

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from data.encode import Encoder
from data.errors import DataError
from data.packing import PackedRows
from data.records import Message
from handoff.errors import HandoffError
from handoff.files import read_json, write_json
from handoff.parent import open_parent
from handoff.stage import StageDir
from stages.sft.train import Collator
from tests.stage_chain import chain, foreign_checkpoint, run_stage, runs, stage_recipe
from training import engines
from training.config import ModelArguments
from training.engines.upstream import score_labels_alone
from training.measure import token_losses
from training.model import Model, load_encoder
from training.recipe import RecipeError, load_recipe
from training.run import Run, run_section


@pytest.fixture(scope="module")
def parent():
    chain()
    return open_parent(str(runs() / "tiny" / "sft"), runs(), {"causal_lm"})


@pytest.fixture(scope="module")
def encoder(parent):
    return load_encoder(parent)


def supervised(encoder: Encoder, question: str, answer: str) -> dict[str, list[int]]:
    ids, mask = encoder.chat([Message("user", question), Message("assistant", answer)])
    return {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)]}


@pytest.mark.slow
def test_it_learns_to_answer_and_to_stop(tmp_path):
    run = run_stage("sft", tmp_path, "train.max_steps=60", "eval_answers=16", "max_new_tokens=24")
    before, after = run.lines[0], run.lines[-2]
    assert before["eval_stop_rate"] < 0.5 and after["eval_stop_rate"] >= 0.95
    assert after["eval_loss"] < before["eval_loss"] - 1
    assert after["eval_mean_token_accuracy"] > before["eval_mean_token_accuracy"]
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 8 + [60] * 8
    assert [s["prompt"] for s in samples[:8]] == [s["prompt"] for s in samples[8:]]
    assert run.manifest.metrics["eval_stop_rate"] == after["eval_stop_rate"]
    generation = json.loads((run.folder / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == run.manifest.tokenizer.stop_ids


@pytest.mark.slow
def test_answers_of_a_bfloat16_training_are_made_by_the_rollout_engine(tmp_path, caplog):
    """The autocast that accelerate puts around the model made it look like another one, and answers came slowly."""
    run = run_stage("sft", tmp_path, "train.bf16=true", "train.max_steps=1", "eval_answers=2", "max_new_tokens=4")
    assert "eval_stop_rate" in run.lines[-2]
    assert "slower plain generation" not in caplog.text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_conversations_do_not_see_one_another(attention, parent, encoder):
    """Loss of packed rows, in a batch with padding = sum of the losses alone."""
    arguments = ModelArguments(attn_implementation=attention)
    model = Model.load(engines.current(), parent, "policy", encoder, arguments).module.eval()
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    rows = [
        supervised(encoder, "uppercase cat", "CAT"),
        supervised(encoder, "max of 3 and 9", "9"),
        supervised(encoder, "repeat: dog egg", "dog egg"),
        supervised(encoder, "repeat: fish", "fish"),
        supervised(encoder, "uppercase ball", "BALL"),
    ]
    collate = Collator(encoder.pad_id)
    with torch.no_grad():
        alone = sum(token_losses(model, collate([row]))["nats"].item() for row in rows)
        padded = token_losses(model, collate(rows))
        packed_rows = PackedRows(rows, [len(row["input_ids"]) for row in rows], 30)
        packed = token_losses(model, collate(list(packed_rows)))
    assert len({len(row["input_ids"]) for row in packed_rows}) > 1 and len(packed_rows) < len(rows)
    assert padded["nats"].sum().item() == pytest.approx(alone, abs=1e-4)
    assert packed["nats"].sum().item() == pytest.approx(alone, abs=1e-4)
    assert packed["tokens"].sum() == padded["tokens"].sum() == sum(i != -100 for r in rows for i in r["labels"])


def test_only_labelled_positions_are_projected_and_the_gradient_is_the_whole_heads(parent, encoder):
    """Against cross-entropy over all logits, with prompts and padding in the batch."""
    model = Model.load(engines.current(), parent, "policy", encoder, ModelArguments()).module.eval()
    rows = [supervised(encoder, "uppercase cat", "CAT"), supervised(encoder, "repeat: dog egg", "dog egg")]
    batch = Collator(encoder.pad_id)(rows)
    labels = batch["labels"][:, 1:]
    logits = model(**{**batch, "labels": None}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum", ignore_index=-100)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    score_labels_alone()
    projected = []
    with patch("trl.trainer.utils._ChunkedLogProbFunction", watching(projected)):
        found = -model(**batch, fused_lm_head=True).log_probs.sum()
    gradient = torch.autograd.grad(found, list(model.parameters()))
    assert projected == [int((labels != -100).sum())]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradient, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def watching(projected: list[int]) -> type:
    """TRL's head, which notes the number of positions that it projects."""

    class Watched:
        @staticmethod
        def apply(hidden, *rest):
            projected.append(len(hidden))
            return ChunkedLogProbFunction.apply(hidden, *rest)

    return Watched


def test_a_batch_is_padded_on_the_right_without_labels(encoder):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(2)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "position_ids" not in batch


@pytest.mark.slow
def test_packing_and_padding_learn_the_same(tmp_path):
    """One step over all rows: the packed gradient equals the padded one, up to rounding."""
    keys = ("train.max_steps=1", "eval_data=[]")
    padded = run_stage(
        "sft", tmp_path / "padded", *keys, "train.global_batch_size=200", "train.per_device_train_batch_size=50"
    )
    # Packed into rows as long as the model's window, the 200 conversations are few rows; one step takes all of them.
    rows = padded.of("num_tokens")[0] / 2048
    packed = run_stage(
        "sft",
        tmp_path / "packed",
        *keys,
        "packing=true",
        "max_length=2048",
        f"train.global_batch_size={math.ceil(rows)}",
        "train.per_device_train_batch_size=1",
    )
    assert packed.of("num_tokens") == padded.of("num_tokens")
    assert packed.of("loss")[0] == pytest.approx(padded.of("loss")[0], rel=1e-5)
    assert packed.of("grad_norm")[0] == pytest.approx(padded.of("grad_norm")[0], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("max_length=8",), DataError, "of 200 rows were dropped, more than max_drop_fraction = 0.5"),
        (("max_length=20", "max_drop_fraction=0.1"), DataError, "more than max_drop_fraction = 0.1"),
        (("max_length=20", "truncation=error"), DataError, r"chats.jsonl:\d+: \d+ tokens, and max_length is 20"),
        (("data=[{source: file, path: nothing.jsonl}]",), DataError, "nothing.jsonl"),
    ],
)
def test_data_that_cannot_be_used_is_refused(overrides, error, message, tmp_path):
    recipe = stage_recipe("sft", tmp_path, *overrides)
    with pytest.raises(error, match=message):
        run_section(recipe, "sft")
    assert not (recipe.run_dir / "sft" / "model").exists()


@pytest.mark.slow
def with_template(folder: Path, template: str | dict[str, str]) -> Path:
    """A foreign checkpoint with another chat template, or with several by name, that pads with its end token."""
    foreign_checkpoint(folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:  # no spare one is left
        token["special"] = token["content"] not in (
            "<|pad|>",
            "<|reserved_2|>",
            *(f"<|reserved_{n}|>" for n in (3, 4, 5, 6, 7)),
        )
    named = (
        [{"name": name, "template": text} for name, text in template.items()]
        if isinstance(template, dict)
        else template
    )
    settings = {**config, "chat_template": named, "pad_token": config["eos_token"]}
    settings.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


QUICK = ("train.max_steps=1", "eval_answers=0", "eval_data=[]")
PLAIN = (
    "{% for m in messages %}<|reserved_0|>{{ m.role }}: {{ m.content }}<|reserved_1|>{% endfor %}"
    "{% if add_generation_prompt %}<|reserved_0|>assistant: {% endif %}"
)


def test_a_chosen_chat_template_is_published_alone(tmp_path):
    foreign = with_template(tmp_path / "foreign", {"plain": PLAIN, "loud": PLAIN.replace("m.role", "m.role | upper")})
    with pytest.raises(
        DataError, match=r"several chat templates \(loud, plain\) and none named default.*chat_template"
    ):
        run_stage("sft", tmp_path, f"parent={foreign}", *QUICK)
    with pytest.raises(HandoffError, match="no chat template named quiet; chat_template chooses one of: loud, plain"):
        run_stage("sft", tmp_path, f"parent={foreign}", "chat_template=quiet", *QUICK)
    run = run_stage("sft", tmp_path, f"parent={foreign}", "chat_template=loud", *QUICK)
    published = open_parent(str(run.folder), tmp_path, {"causal_lm"})
    encoder = load_encoder(published)
    assert encoder.pad_id == encoder.eos_id == published.tokenizer.pad_id
    assert "USER: hello" in encoder.tokenizer.decode(encoder.prompt([Message("user", "hello")]))
    again = run_stage("dpo", tmp_path, f"parent={run.folder}", "max_length=64", "train.max_steps=1", "eval_data=[]")
    assert again.manifest.tokenizer == run.manifest.tokenizer


def test_a_resume_renders_with_the_clock_of_the_first_start(tmp_path):
    foreign = with_template(tmp_path / "foreign", "{{ strftime_now('%d %b %Y') }}" + PLAIN)
    recipe = stage_recipe("sft", tmp_path, f"parent={foreign}", *QUICK)
    seen = []

    class Watched(Run):
        def rows(self, *args, **options):
            rows = super().rows(*args, **options)
            seen.append(args[2].tokenizer.decode(rows[0]["input_ids"]))
            return rows

    run_section(recipe, "sft", Watched)
    started = recipe.run_dir / "sft" / "started.json"
    content = json.loads(started.read_text())
    assert content["begun"] == StageDir(started.parent).manifest().begun
    started.write_text(json.dumps({**content, "begun": "2026-02-03T23:59:59+00:00"}))
    run_section(recipe, "sft", Watched)
    assert "03 Feb 2026" not in seen[0] and "03 Feb 2026" in seen[1]
    assert StageDir(started.parent).manifest().begun == "2026-02-03T23:59:59+00:00"


def test_a_foreign_checkpoint_is_tuned_with_its_own_tokenizer_and_template(tmp_path):
    foreign = foreign_checkpoint(tmp_path / "foreign")
    run = run_stage("sft", tmp_path / "runs", f"parent={foreign}", "train.max_steps=60", "max_new_tokens=24")
    assert run.lines[-2]["eval_loss"] < run.lines[0]["eval_loss"] - 1
    assert run.lines[-2]["eval_stop_rate"] >= 0.75  # it learned the end of turn of that template
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (run.folder / "model" / name).read_bytes() == (foreign / name).read_bytes()
    assert {tensor.dtype for tensor in run.weights.values()} == {torch.bfloat16}
    # It can also be a parent.
    on = run_stage("dpo", tmp_path / "runs", f"parent={run.folder}", "train.max_steps=2")
    assert on.manifest.tokenizer == run.manifest.tokenizer


def test_an_end_token_that_only_the_configuration_names_is_published_as_it_was_read(tmp_path):
    foreign = foreign_checkpoint(tmp_path / "foreign")
    (foreign / "generation_config.json").unlink()
    for name, changes in (("tokenizer_config.json", {"eos_token": None}), ("config.json", {"eos_token_id": 1})):
        write_json(foreign / name, {**read_json(foreign / name), **changes})
    read = open_parent(str(foreign), tmp_path, {"causal_lm"}).tokenizer
    run = run_stage("sft", tmp_path / "runs", f"parent={foreign}", "train.max_steps=1")
    assert run.manifest.tokenizer.eos_id == read.eos_id == 1
    on = run_stage("dpo", tmp_path / "runs", f"parent={run.folder}", "train.max_steps=1")
    assert on.manifest.tokenizer == run.manifest.tokenizer


def test_a_tokenizer_is_refused_as_a_parent(tmp_path):
    recipe = stage_recipe("sft", tmp_path, f"parent={runs() / 'tiny' / 'tokenizer'}")
    with pytest.raises(RecipeError, match="tokenizer is a tokenizer, and a language model is needed here"):
        run_section(recipe, "sft")


def test_two_ways_to_avoid_padding_are_refused():
    with pytest.raises(RecipeError, match="choose one"):
        load_recipe(chain(), ["sft.packing=true", "sft.group_by_length=true"])
