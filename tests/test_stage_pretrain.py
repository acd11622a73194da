"""The pretraining stage: its input, the architectures that it builds, its metrics, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from data.encode import Encoder
from stages.evaluate.likelihood import BITS, of_documents
from stages.pretrain.train import Collator, Windows
from tests.stage_chain import chain, run_stage, runs, stage_recipe
from training import engines
from training.architecture import model_config
from training.config import ModelArguments
from training.engines.deepspeed import DeepSpeed
from training.engines.launch import LaunchError, Request
from training.measure import token_losses
from training.model import Model
from training.recipe import RecipeError, load_recipe
from training.run import run_section

SMALL = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
ARCHITECTURES = {
    "llama": f"{SMALL}, intermediate_size: 64",
    "mistral": f"{SMALL}, intermediate_size: 64, num_key_value_heads: 2, sliding_window: null",
    "qwen3": f"{SMALL}, intermediate_size: 64, num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true",
    "gpt2": f"{SMALL}, max_position_embeddings: 64",
}


@pytest.fixture(scope="module")
def encoder():
    chain()
    return Encoder.from_pretrained(runs() / "tiny" / "tokenizer" / "model")


def build(encoder, architecture="llama", attention="sdpa", **more):
    keys = {"architecture": architecture, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **more}
    if architecture != "gpt2":
        keys["intermediate_size"] = 64
    torch.manual_seed(0)
    config = model_config(keys, encoder, 64)
    arguments = ModelArguments(attn_implementation=attention)
    model = Model.build(engines.current(), config, encoder, arguments, bf16=False).module.eval()
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_publishes_and_continues(architecture, tmp_path):
    model = f"model={{architecture: {architecture}, {ARCHITECTURES[architecture]}}}"
    first = run_stage("pretrain", tmp_path / "first", model, "train.max_steps=8")
    losses = first.of("eval_loss")
    assert losses[-1] < losses[0] - 0.5
    # Continues from the checkpoint, with the checkpoint's vocabulary.
    on = run_stage(
        "pretrain", tmp_path / "on", f"parent={first.folder}", "model=null", "train.max_steps=8", "train.warmup_steps=2"
    )
    assert on.of("eval_loss")[0] == pytest.approx(losses[-1], rel=1e-5)
    assert on.of("eval_loss")[-1] < losses[-1]
    assert on.manifest.tokenizer == first.manifest.tokenizer
    assert "weights/changed" not in first.manifest.metrics and on.manifest.metrics["weights/changed"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
def test_bits_per_byte_are_those_of_the_evaluation(isolated, tmp_path):
    run = run_stage("pretrain", tmp_path, "train.max_steps=4", f"isolate_documents={str(isolated).lower()}")
    folder = run.folder / "model"
    model, encoder = AutoModelForCausalLM.from_pretrained(folder), Encoder.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (runs().parent / "held_documents.jsonl").read_text().splitlines()]
    expected = -sum(of_documents(model, encoder, texts, 48, 8)) * BITS / sum(len(text.encode()) for text in texts)
    assert run.manifest.metrics["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_muon_learns_faster_than_adamw_without_tuning(tmp_path):
    """Both at usual rates, 20 steps; measured 2.80 against 2.87 here."""
    muon = run_stage("pretrain", tmp_path / "muon", "train.optim=muon")
    adamw = run_stage("pretrain", tmp_path / "adamw")
    assert muon.of("loss")[0] == adamw.of("loss")[0]
    assert muon.manifest.metrics["eval_loss"] < adamw.manifest.metrics["eval_loss"]


@pytest.mark.slow
def test_warmup_stable_decay_has_the_three_parts(tmp_path):
    keys = ("train.lr_scheduler_type=warmup_stable_decay", "train.warmup_steps=4", "train.decay_steps=0.4")
    rates = run_stage("pretrain", tmp_path, *keys, "train.max_steps=10").of("learning_rate")
    assert rates[:4] == pytest.approx([0, 0.0025, 0.005, 0.0075])
    assert rates[4:6] == pytest.approx([0.01, 0.01])
    assert rates[6] == pytest.approx(0.01) and rates[6:] == sorted(set(rates[6:]), reverse=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_isolated_documents_do_not_see_one_another(architecture, attention, encoder):
    """Loss of each document in a packed block = its loss alone, in batches of one and two."""
    model = build(encoder, architecture, attention)
    texts = ["Ann has 3 balls.", "Bob has 41 dogs. Eve has 2 cats.", "Finn has 7 eggs."]
    documents = encoder.documents(texts)
    alone = []
    for ids in documents:
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
        with torch.no_grad():
            alone.append(token_losses(model, batch)["nats"].item())
    block = np.array([t for ids in documents for t in ids], dtype=np.int32)
    for rows in ([block], [block, block[::-1].copy()]):
        batch = Collator(encoder.eos_id)(rows)
        with torch.no_grad():
            together = token_losses(model, batch)["nats"][0].item()
        assert together == pytest.approx(sum(alone), abs=1e-4)
    # By default documents see earlier ones, so the loss differs.
    with torch.no_grad():
        assert abs(token_losses(model, Collator(None)([block]))["nats"][0].item() - sum(alone)) > 0.1


def test_a_document_begins_at_position_0_and_nothing_predicts_its_first_token():
    block = np.array([5, 6, 1, 7, 1, 1, 8, 9], dtype=np.int32)  # 1 ends a document
    batch = Collator(1)([block])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert batch["labels"].tolist() == [[5, 6, 1, -100, 1, -100, -100, 9]]
    assert batch["input_ids"].tolist() == [block.tolist()]


@pytest.mark.parametrize(("tokens", "width"), [(100, 16), (97, 16), (15, 16), (5, 16), (16, 16), (33, 8)])
def test_windows_score_each_token_once_with_context(tokens, width):
    stream = list(range(10, 10 + tokens))
    windows = Windows(np.array(stream), 1, width)
    scored = [label for window in windows for label in window[1] if label != -100]
    assert scored == stream
    for window in windows:
        first = int(np.argmax(window[1] != -100))
        assert (window[1][first:] == window[0][first:]).all()
    for window in list(windows)[1:]:
        assert np.argmax(window[1] != -100) >= width // 2


def test_bits_per_byte_do_not_depend_on_the_batch_and_are_those_of_the_whole(encoder):
    """A model with uniform predictions needs log2(V) bits per token, whatever the windows."""
    model = build(encoder)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    documents = encoder.documents(["Ann has 3 balls. Bob has 4 cats."] * 5)
    windows = Windows(np.concatenate(documents), encoder.eos_id, 24)
    with torch.no_grad():
        found = token_losses(model, Collator(None).labelled(list(windows)))
    tokens = sum(map(len, documents))
    assert found["tokens"].sum().item() == tokens
    assert found["nats"].sum().item() / math.log(2) == pytest.approx(tokens * math.log2(encoder.vocab_size), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=null",), r"pretrain.model: says what to build from a tokenizer"),
        (("model={architecture: lama}",), r"recipe.yaml: pretrain.model.architecture: .*did you mean `llama`"),
        (("model={architecture: llama, hiden_size: 4}",), r"pretrain.model.hiden_size: .*did you mean `hidden_size`"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_anything_is_read(overrides, message, tmp_path):
    recipe = stage_recipe("pretrain", tmp_path, *overrides)
    with pytest.raises(RecipeError, match=message):
        run_section(recipe, "pretrain")
    assert not (recipe.run_dir / "pretrain" / "model").exists()


def test_a_model_beside_a_checkpoint_is_refused(tmp_path):
    recipe = stage_recipe("pretrain", tmp_path, f"parent={runs() / 'tiny' / 'pretrain'}")
    with pytest.raises(RecipeError, match="the parent is a model already"):
        run_section(recipe, "pretrain")


def test_a_recipe_without_an_architecture_is_refused_at_once():
    with pytest.raises(RecipeError, match="needs `architecture`"):
        load_recipe(chain(), ["pretrain.model={hidden_size: 4}"])


def test_muon_is_refused_where_an_engine_cuts_matrices(tmp_path, monkeypatch):
    recipe = stage_recipe("pretrain", tmp_path, "train.optim=muon")
    monkeypatch.setattr(engines, "start", lambda: DeepSpeed(Request("deepspeed", 3, 1, "cpu")))
    with pytest.raises(LaunchError, match="muon steps whole matrices, and deepspeed cuts them"):
        run_section(recipe, "pretrain")
