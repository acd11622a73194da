"""The contract of the hand-off: the record read from a model's files, and the message of each violation."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from handoff.contract import check_foreign, check_model, check_same_encoding, write_pad_token
from handoff.encoding import read_tokenizer
from handoff.errors import HandoffError
from handoff.parent import open_parent
from handoff.weights import embedding_shape, read_tensors
from tests.handoff_models import TEMPLATE, published, write, write_model, write_tokenizer

GPT2 = ("<|endoftext|>",)
LLAMA2 = ("<unk>", "<s>", "</s>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
    "<|finetune_right_pad_id|>",
)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


# ---- what is read


def test_reads_ids_stops_and_size(tmp_path: Path) -> None:
    write_model(tmp_path)
    record = read_tokenizer(tmp_path)
    assert (record.bos_id, record.eos_id, record.pad_id, record.stop_ids) == (0, 1, 2, [1, 5])
    assert record.vocab_size == 11
    assert embedding_shape(tmp_path)[0] == 11


def test_the_same_files_give_the_same_fingerprints_in_any_key_order(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b")
    path = tmp_path / "b" / "tokenizer.json"
    content = json.loads(path.read_text())
    # transformers keeps the last call's truncation in the file, which does not change how text is encoded.
    write(path, {**dict(reversed(content.items())), "truncation": {"max_length": 8}, "padding": None})
    assert read_tokenizer(tmp_path / "a") == read_tokenizer(tmp_path / "b")


def test_a_vocabulary_a_template_and_a_stop_id_are_part_of_the_fingerprints(tmp_path: Path) -> None:
    write_model(tmp_path / "plain")
    write_model(tmp_path / "template", template=TEMPLATE + "\n")
    write_model(tmp_path / "stops", stops=(1,))
    write_model(tmp_path / "vocab")
    path = tmp_path / "vocab" / "tokenizer.json"
    path.write_text(path.read_text().replace('"d"', '"e"'))
    plain, template, stops, vocab = (read_tokenizer(tmp_path / n) for n in ("plain", "template", "stops", "vocab"))
    assert plain.fingerprint == template.fingerprint == stops.fingerprint != vocab.fingerprint
    assert len({plain.template_fingerprint, template.template_fingerprint, stops.template_fingerprint}) == 3


def test_a_template_in_the_tokenizer_config_is_the_template(tmp_path: Path) -> None:
    write_model(tmp_path / "file")
    for name, template in (
        ("key", TEMPLATE),
        ("named", [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]),
    ):
        write_model(tmp_path / name, template=None)
        path = tmp_path / name / "tokenizer_config.json"
        write(path, {**json.loads(path.read_text()), "chat_template": template})
        assert read_tokenizer(tmp_path / name) == read_tokenizer(tmp_path / "file")


def test_special_tokens_written_as_objects_and_in_the_map_are_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    write(tmp_path / "tokenizer_config.json", {"eos_token": {"content": "<|eos|>", "lstrip": False}})
    write(tmp_path / "special_tokens_map.json", {"pad_token": "<|pad|>", "bos_token": {"content": "<|bos|>"}})
    record = read_tokenizer(tmp_path)
    assert (record.bos_id, record.eos_id, record.pad_id) == (0, 1, 2)


def test_a_unigram_vocabulary_numbers_its_entries(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["<pad>", 0.0], ["a", -1.0]]
    write(tmp_path / "tokenizer.json", {"model": {"type": "Unigram", "vocab": pieces}})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "<pad>"})
    record = read_tokenizer(tmp_path)
    assert (record.vocab_size, record.eos_id, record.pad_id, record.bos_id) == (4, 1, 2, None)


@pytest.mark.parametrize(
    ("special", "eos", "turn", "expected"),
    [
        (QWEN, "<|endoftext|>", "<|im_end|>", [0, 2]),
        (LLAMA3, "<|end_of_text|>", "<|eot_id|>", [1, 2]),
        (GEMMA, "<eos>", "<end_of_turn>", [1, 5]),
        (LLAMA2, "</s>", "</s>", [2]),
    ],
    ids=["qwen", "llama3", "gemma", "llama2"],
)
def test_without_a_generation_config_stop_ids_come_from_the_template(
    tmp_path: Path, special: tuple[str, ...], eos: str, turn: str, expected: list[int]
) -> None:
    write_tokenizer(tmp_path, special, bos=None, eos=eos, pad=None, template=f"{{{{ content }}}}{turn}")
    assert read_tokenizer(tmp_path, choose_pad=True).stop_ids == expected


def test_an_end_of_turn_in_ordinary_text_is_not_a_stop_id(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, LLAMA2, bos="<s>", eos="</s>", pad="<unk>", template="{{ content }}<|im_end|>")
    assert read_tokenizer(tmp_path).stop_ids == [2]


def test_a_single_stop_id_may_be_a_number(tmp_path: Path) -> None:
    write_model(tmp_path, stops=1)
    assert read_tokenizer(tmp_path).stop_ids == [1]


# ---- pad


@pytest.mark.parametrize(
    ("special", "eos", "declared", "expected"),
    [
        (LLAMA3, "<|end_of_text|>", None, "<|finetune_right_pad_id|>"),
        (LLAMA3[:4], "<|end_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
        (QWEN, "<|endoftext|>", "<|endoftext|>", "<|vision_pad|>"),
        (LLAMA2, "</s>", "</s>", "<unk>"),
        (GEMMA, "<eos>", None, "<pad>"),
    ],
    ids=["llama3.1", "llama3", "qwen", "llama2", "gemma"],
)
def test_a_foreign_model_without_a_pad_gets_a_spare_token(
    tmp_path: Path,
    special: tuple[str, ...],
    eos: str,
    declared: str | None,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_model(tmp_path, special=special, bos=None, eos=eos, pad=declared, stops=None, template=None)
    with caplog.at_level(logging.WARNING):
        _, record = check_foreign(tmp_path)
    assert record.pad_id == special.index(expected)
    assert expected in caplog.text


def test_the_chosen_pad_is_written_into_what_is_published(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    write_model(foreign, special=QWEN, rows=8, bos=None, eos="<|endoftext|>", pad="<|endoftext|>", stops=(0, 2))
    parent = open_parent(str(foreign), tmp_path / "run", {"causal_lm"})

    def write_child(directory: Path) -> None:
        # As stages do it: the parent's files unchanged, and the record's ids in generation_config.json.
        write_model(directory, special=QWEN, rows=8, bos=None, eos="<|endoftext|>", pad="<|endoftext|>")
        record = parent.tokenizer
        write(directory / "generation_config.json", {"eos_token_id": record.stop_ids, "pad_token_id": record.pad_id})

    stage = published(tmp_path / "run" / "sft", write_child, tokenizer=parent.tokenizer)
    child = open_parent("sft", tmp_path / "run", {"causal_lm"})
    assert child.tokenizer == parent.tokenizer
    assert json.loads((stage.model_dir / "tokenizer_config.json").read_text())["pad_token"] == "<|vision_pad|>"


def test_a_pad_that_the_tokenizer_names_stays_as_it_is(tmp_path: Path) -> None:
    write_model(tmp_path)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    write_pad_token(tmp_path, read_tokenizer(tmp_path))
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


def test_without_any_spare_token_a_model_pads_with_its_end_token(tmp_path: Path) -> None:
    write_model(tmp_path, special=GPT2, bos="<|endoftext|>", eos="<|endoftext|>", pad=None, stops=None, template=None)
    _, record = check_foreign(tmp_path)
    assert record.pad_id == record.eos_id
    write_pad_token(tmp_path, record)
    write(tmp_path / "generation_config.json", {"eos_token_id": record.stop_ids, "pad_token_id": record.pad_id})
    assert check_model(tmp_path, "causal_lm") == record
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"


# ---- chat templates with names


@pytest.mark.parametrize("in_files", [False, True])
def test_a_named_chat_template_is_chosen(tmp_path: Path, in_files: bool) -> None:
    write_model(tmp_path, template=None)
    default = read_tokenizer(tmp_path)
    named = {"rag": "{{ messages[0].content }}<|end|>", "plain": "{{ messages | length }}"}
    if in_files:
        (tmp_path / "additional_chat_templates").mkdir()
        for name, template in named.items():
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    else:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        listed = [{"name": name, "template": template} for name, template in named.items()]
        write(tmp_path / "tokenizer_config.json", {**config, "chat_template": listed})
    assert read_tokenizer(tmp_path) == default  # there is no template named default
    chosen = read_tokenizer(tmp_path, template="rag")
    (tmp_path / "chat_template.jinja").write_text(named["rag"])  # as a stage publishes it
    assert read_tokenizer(tmp_path) == chosen != default
    assert read_tokenizer(tmp_path, template="default") == chosen
    with pytest.raises(HandoffError, match="no chat template named rga; chat_template chooses one of: default, plain"):
        read_tokenizer(tmp_path, template="rga")


# ---- violations


def test_a_good_model_passes(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert check_model(tmp_path, "causal_lm") == read_tokenizer(tmp_path)
    assert check_foreign(tmp_path) == ("causal_lm", read_tokenizer(tmp_path))


def test_a_missing_eos_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, eos=None)
    with pytest.raises(HandoffError, match="no eos_token"):
        check_model(tmp_path, "causal_lm")


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, pad="[PAD]")
    with pytest.raises(HandoffError, match=r"pad_token '\[PAD\]' is not in the vocabulary"):
        check_model(tmp_path, "causal_lm")


def test_more_ids_than_embeddings_names_both_sizes(tmp_path: Path) -> None:
    write_model(tmp_path, rows=9)
    with pytest.raises(HandoffError, match="11 ids but the model only 9 embeddings"):
        check_model(tmp_path, "causal_lm")
    with pytest.raises(HandoffError, match="11 ids but the model only 9 embeddings"):
        check_foreign(tmp_path)


def test_padded_embeddings_are_fine(tmp_path: Path) -> None:
    write_model(tmp_path, rows=64)
    assert check_model(tmp_path, "causal_lm").vocab_size == 11


def test_a_config_that_disagrees_with_the_weights_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    write(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "vocab_size": 12})
    with pytest.raises(HandoffError, match="vocab_size 12, the weights have 11"):
        check_model(tmp_path, "causal_lm")


def test_a_generation_config_without_eos_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, stops=None)
    with pytest.raises(HandoffError, match=r"generation_config\.json has no eos_token_id"):
        check_model(tmp_path, "causal_lm")
    assert check_model(tmp_path, "reward_model").eos_id == 1  # it never generates


def test_a_generation_config_that_ignores_eos_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, stops=(5,))
    with pytest.raises(HandoffError, match=r"stops at \[5\], but not at the tokenizer's eos"):
        check_model(tmp_path, "causal_lm")


def test_a_stop_id_beyond_the_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, stops=(1, 99))
    with pytest.raises(HandoffError, match=r"stop ids \[99\] are beyond"):
        check_model(tmp_path, "causal_lm")


def test_an_empty_tensor_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    tensors = {"model.embed_tokens.weight": np.ones((11, 2), np.float32), "lm_head.weight": np.ones((0,), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HandoffError, match=r"lm_head.weight has no elements .*without gathering"):
        check_model(tmp_path, "causal_lm")


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "modeling.py"])
def test_pickles_and_code_are_not_published(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(HandoffError, match=f"{name}: a published model must not contain pickles or code"):
        check_model(tmp_path, "causal_lm")


def test_a_checkpoint_with_only_pickles_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(HandoffError, match=r"only as pickles \(pytorch_model.bin\).*save_pretrained"):
        check_foreign(tmp_path)


def test_pickles_beside_safetensors_are_ignored_in_a_foreign_model(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert check_foreign(tmp_path)[0] == "causal_lm"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    write(tmp_path / name, {**json.loads((tmp_path / name).read_text()), "auto_map": {"AutoModel": "m.M"}})
    with pytest.raises(HandoffError, match=f"{name} requests remote code"):
        check_foreign(tmp_path)


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    write(tmp_path / "adapter_config.json", {})
    with pytest.raises(HandoffError, match="beside the weights of a model"):
        check_foreign(tmp_path)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match=r"neither stage.json nor config.json"):
        check_foreign(tmp_path)


def test_a_config_without_weights_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(HandoffError, match="no weights"):
        check_foreign(tmp_path)


def test_a_checkpoint_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(HandoffError, match=r"no tokenizer.json; convert"):
        check_foreign(tmp_path)


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, architecture="BertForTokenClassification")
    with pytest.raises(HandoffError, match="BertForTokenClassification"):
        check_foreign(tmp_path)


def test_a_sequence_classifier_is_a_reward_model(tmp_path: Path) -> None:
    write_model(tmp_path, architecture="LlamaForSequenceClassification", stops=None)
    assert check_foreign(tmp_path)[0] == "reward_model"


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert check_foreign(tmp_path)[0] == "tokenizer"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(HandoffError, match="truncated"):
        check_foreign(tmp_path)
    path.write_bytes(b"\x00")
    with pytest.raises(HandoffError, match="truncated"):
        check_foreign(tmp_path)


def test_shards_are_followed_and_a_missing_one_is_named(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": np.ones((11, 2), np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    weights = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    write(tmp_path / "model.safetensors.index.json", {"weight_map": weights})
    assert sorted(read_tensors(tmp_path)) == ["lm_head.weight", "model.embed_tokens.weight"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HandoffError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_foreign(tmp_path)


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "gpt_neox.embed_in.weight", "model.decoder.embed_tokens.weight"]
)
def test_the_embedding_is_found_by_its_name(tmp_path: Path, name: str) -> None:
    tensors = {name: np.ones((7, 2), np.float32), "transformer.wpe.weight": np.ones((5, 2), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert embedding_shape(tmp_path)[0] == 7


def test_weights_without_an_embedding_are_refused(tmp_path: Path) -> None:
    save_file({"score.weight": np.ones((1, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(HandoffError, match="no tensor has the name of a token embedding"):
        embedding_shape(tmp_path)


# ---- two models


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"special": ("<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"), "stops": (1, 3), "rows": 8},
            r"different tokenizers \(11 and 8",
        ),
        ({"template": TEMPLATE + " "}, "differ in their chat templates"),
        ({"bos": "<|reserved_0|>"}, "special ids .bos 0 and 6"),
    ],
    ids=["tokenizer", "template", "bos"],
)
def test_different_encodings_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", **change)
    a, b = (open_parent(str(tmp_path / name), tmp_path, {"causal_lm"}) for name in ("a", "b"))
    check_same_encoding(a, a, "never raised")
    with pytest.raises(HandoffError, match=message) as raised:
        check_same_encoding(a, b, "the reward model reads the policy's tokens")
    assert "the reward model reads the policy's tokens" in str(raised.value)


@pytest.mark.parametrize("change", [{"stops": (1,)}, {"pad": "<|reserved_0|>"}], ids=["stops", "pad"])
def test_models_that_read_alike_may_stop_and_pad_differently(tmp_path: Path, change: dict[str, object]) -> None:
    """A base model from elsewhere may lack a stop id that a reward model trained from it has."""
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", **change)
    a, b = (open_parent(str(tmp_path / name), tmp_path, {"causal_lm"}) for name in ("a", "b"))
    assert a.tokenizer.template_fingerprint != b.tokenizer.template_fingerprint
    check_same_encoding(a, b, "never raised")
