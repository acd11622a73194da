"""One good small model, and many malformed copies of it, for the tests of the gate (handoff/gate.py).

A mutation is a function that changes a copy of the good directory. `outside` is a directory beside the copy with good
files, to which nothing in the copy may lead.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data.template import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS
from handoff.gate import LIMITS
from handoff.settings import REFUSED
from handoff.weights import INDEX_NAME

Mutation = Callable[[Path, Path], None]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_WRONG: tuple[Any, ...] = (None, 10**12, "x", [None])
_TEXTS = {
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "NaN": "NaN",
    "NaN inside": '{"x": NaN}',
    "nested 400 times": '{"x": ' * 400 + "1" + "}" * 400,
    "nested 100,000 times": "[" * 100_000,
    "an integer of 5,000 digits": '{"x": ' + "9" * 5000 + "}",
    "a lone surrogate": '{"\\ud800": 1}',
    "nothing": "",
    "no JSON": "{'x': 1}",
}


def write_good(folder: Path, sharded: bool = False) -> Path:
    """A Llama of one layer with the byte-level tokenizer of Baton's own template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: n for n, text in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (BOS, EOS, PAD)],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(folder, max_shard_size="10KB" if sharded else "1GB")
    return folder


def mutations(folder: Path) -> Iterator[tuple[str, Mutation]]:
    """(description, mutation) of every kind for every file of the good directory `folder`."""
    for path in sorted(folder.iterdir()):
        yield from _of_any_file(path.name)
        if path.suffix == ".json":
            yield from _of_json(path)
    for file, keys in REFUSED.items():
        for key in keys:
            yield f"{file} with {key}", _with(file, {key: ["tokenizer.5.0.json", "../outside/model.safetensors"]})
    for key, value in _SETTINGS:
        yield f"config.json with {key} {value!r}"[:80], _with("config.json", {key: value})
    for key, value in _TOKENIZER_SETTINGS:
        yield f"tokenizer_config.json with {key}", _with("tokenizer_config.json", {key: value})
    for key in ("tokenizer_file", "vocab_file", "chat_template", "name_or_path"):
        yield f"special tokens with {key}", _with("special_tokens_map.json", {key: "../outside/tokenizer.json"})
    for key in ("to_dict", "__class__", "_get_files_timestamps", "cache_implementation", "compile_config"):
        yield f"generation_config.json with {key}", _with("generation_config.json", {key: "x"})
    for stops in ("1", [None], [-1], [1.5], [True], [[1]], {}, 10**12, ["<|eos|>"]):
        yield f"stop ids {stops!r}", _with("generation_config.json", {"eos_token_id": stops})
    yield from _of_headers()
    yield from _of_index()
    yield from _of_other_files()


_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("transformers_weights", "pytorch_model.bin"),
    ("transformers_weights", "adapter_model.bin"),
    ("transformers_weights", "sub/model.safetensors"),
    ("transformers_weights", "../outside/model.safetensors"),
    ("configuration_files", ["config.4.0.0.json"]),
    ("configuration_files", None),
    ("auto_map", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
    ("auto_map", {"AutoModelForCausalLM": "org/repo--code.Model"}),
    ("auto_map", "code.Model"),
    ("text_config", {"auto_map": {"AutoModel": "code.Model"}}),
    ("_attn_implementation", "org/" + "x" * 100_000),
    ("auto_map", {"AutoModelForCausalLM": [None]}),
    ("_attn_implementation", "org/kernel"),
    ("attn_implementation", "org/kernel"),
    ("_attn_implementation", "org/kernel@main:forward"),
    ("_attn_implementation", {"": "org/kernel"}),
    ("_attn_implementation_internal", "org/kernel"),
    ("_experts_implementation", "org/kernel"),
    ("_attn_implementation", "eager"),
    ("quantization_config", {"quant_method": "gguf", "gguf_file": "x.gguf"}),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("quantization_config", 5),
    ("fusion_config", {"x": True}),
    ("vision_config", {"model_type": "timm_wrapper", "architecture": "hf-hub:org/model"}),
    ("text_config", {"transformers_weights": "x.bin"}),
    ("text_config", 5),
    ("model_type", "no_such_model"),
    ("model_type", ["llama"]),
    ("model_type", "rag"),
    ("tokenizer_class", "AutoModel"),
    ("tokenizer_class", "AutoTokenizer"),
    ("tokenizer_class", "../code"),
    ("dtype", "load"),
    ("dtype", "torch.load"),
    ("num_hidden_layers", 10**9),
    ("num_layers", 1e300),
    ("vocab_size", 10**15),
    ("to_dict", 1),
    ("save_pretrained", 1),
    ("validate", "x"),
    ("__dict__", {"x": 1}),
    ("__class__", "x"),
    ("attribute_map", {"hidden_size": "x"}),
    ("extra_files", ["../outside/model.safetensors"]),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", ["AutoModelForCausalLM"]),
    ("architectures", [5]),
    ("per_layer_config", {"0": {"hidden_size": 9}}),
    ("rope_parameters", {"rope_type": "../x"}),
    ("id2label", {"x": "y"}),
    ("hidden_act", "org/kernel"),
    ("is_encoder_decoder", True),
)
_TOKENIZER_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("fast_tokenizer_files", ["tokenizer.5.0.0.json"]),
    ("fast_tokenizer_files", None),
    ("tokenizer_class", "AutoModelForCausalLM"),
    ("tokenizer_class", "RagTokenizer"),
    ("tokenizer_class", "AutoTokenizer"),
    ("tokenizer_class", "GPT2Tokenizer"),
    ("auto_map", {"AutoTokenizer": ["code.Tokenizer", None]}),
    ("auto_map", ["code.Tokenizer", None]),
    ("auto_map", {"AutoTokenizer": 5}),
    ("auto_map", []),
    ("trust_remote_code", True),
    ("chat_template", [{"name": 5}]),
    ("chat_template", {"default": "x"}),
    ("pad_token", ["<|pad|>"]),
    ("eos_token", {"text": "<|eos|>"}),
    ("added_tokens_decoder", {"x": {"content": "y"}}),
    ("added_tokens_decoder", {"99999": {"content": "y"}}),
    ("extra_special_tokens", {"x": 5}),
    ("model_max_length", "x"),
    ("from_pretrained", 1),
)


def _with(file: str, keys: dict[str, Any]) -> Mutation:
    def change(folder: Path, outside: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**content, **keys}), encoding="utf-8")

    return change


def _replaced(file: str, make: Callable[[Path, bytes, Path], object]) -> Mutation:
    """`make(path, bytes of the good file, outside)` makes what stands in place of the file."""

    def change(folder: Path, outside: Path) -> None:
        path = folder / file
        content = path.read_bytes()
        path.unlink()
        make(path, content, outside)

    return change


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _of_any_file(name: str) -> Iterator[tuple[str, Mutation]]:
    kinds: dict[str, Callable[[Path, bytes, Path], object]] = {
        "missing": lambda path, content, outside: None,
        "cut in half": lambda path, content, outside: path.write_bytes(content[: len(content) // 2]),
        "one byte short": lambda path, content, outside: path.write_bytes(content[:-1]),
        "empty": lambda path, content, outside: path.write_bytes(b""),
        "binary": lambda path, content, outside: path.write_bytes(b"\xff\xfe\x00" * 50),
        "UTF-16": lambda path, content, outside: path.write_bytes(content.decode("latin-1").encode("utf-16")),
        "with a byte order mark": lambda path, content, outside: path.write_bytes(b"\xef\xbb\xbf" + content),
        "a FIFO": lambda path, content, outside: os.mkfifo(path),
        "a folder": lambda path, content, outside: path.mkdir(),
        "a link out": lambda path, content, outside: path.symlink_to(outside / path.name),
        "a relative link out": lambda path, content, outside: path.symlink_to(f"../outside/{path.name}"),
        "a link to a device": lambda path, content, outside: path.symlink_to("/dev/zero"),
        "a dangling link": lambda path, content, outside: path.symlink_to("nowhere"),
        "a link to itself": lambda path, content, outside: path.symlink_to(path.name),
        "a link inside": lambda path, content, outside: (
            path.with_name("kept").write_bytes(content),
            path.symlink_to("kept"),
        ),
    }
    if name in LIMITS:
        kinds["too large"] = lambda path, content, outside: _sparse(path, LIMITS[path.name] + 1)
    for kind, make in kinds.items():
        yield f"{name} is {kind}", _replaced(name, make)


def _of_json(path: Path) -> Iterator[tuple[str, Mutation]]:
    def writes(text: str) -> Callable[[Path, bytes, Path], object]:
        return lambda path, content, outside: path.write_text(text, encoding="utf-8")

    for kind, text in _TEXTS.items():
        yield f"{path.name} holds {kind}", _replaced(path.name, writes(text))
    for key in json.loads(path.read_text(encoding="utf-8")):
        for value in _WRONG:
            yield f"{path.name}: {key} = {value!r}", _with(path.name, {key: value})


def _of_headers() -> Iterator[tuple[str, Mutation]]:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers: dict[str, Any] = {
        "a list": [],
        "a list of tensors": {"x": []},
        "no offsets": {"x": {"dtype": "F32", "shape": [2]}},
        "negative offsets": {"x": {**tensor, "data_offsets": [-8, 0]}},
        "offsets that are text": {"x": {**tensor, "data_offsets": ["0", "8"]}},
        "offsets beyond the file": {"x": {**tensor, "data_offsets": [0, 1 << 50]}},
        "a hole": {"x": {**tensor, "data_offsets": [4, 12]}},
        "two tensors in one place": {"x": tensor, "y": tensor},
        "a type that is unknown": {"x": {**tensor, "dtype": "F99"}},
        "a type that is a number": {"x": {**tensor, "dtype": 5}},
        "a negative shape": {"x": {**tensor, "shape": [-2]}},
        "a huge shape": {"x": {**tensor, "shape": [1 << 62, 1 << 62]}},
        "a shape that is null": {"x": {**tensor, "shape": None}},
        "metadata that is a number": {"__metadata__": 5, "x": tensor},
        "text in place of a tensor": {"x": {"a": "b"}},
        "only another tensor": {"x": tensor},
    }

    def writes(text: str) -> Mutation:
        def change(folder: Path, outside: Path) -> None:
            for path in folder.glob("*.safetensors"):
                path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0" * 8)

        return change

    for kind, header in headers.items():
        yield f"a header with {kind}", writes(json.dumps(header))
    yield "a header with deep nesting", writes("[" * 100_000)
    yield "a header with NaN", writes('{"x": NaN}')
    yield (
        "a header with half of a character",
        writes('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    )


def _of_index() -> Iterator[tuple[str, Mutation]]:
    def writes(content: Any) -> Mutation:
        def change(folder: Path, outside: Path) -> None:
            (folder / "model.safetensors").unlink(missing_ok=True)
            for name in SHARDS:
                (folder / name).unlink(missing_ok=True)
                (folder / "sub").mkdir(exist_ok=True)
                shutil.copyfile(outside / "model.safetensors", folder / "sub" / name)
            (folder / INDEX_NAME).write_text(json.dumps(content))

        return change

    tensor = "model.embed_tokens.weight"
    names: tuple[Any, ...] = (
        *("../outside/model.safetensors", "/outside/model.safetensors", "sub/model-00001-of-00002.safetensors"),
        *("", ".", "..", "kept", "x.bin", "x\0.safetensors", "\u202e.safetensors", 5, None, ["model.safetensors"]),
    )
    for name in names:
        yield f"an index that names {name!r}", writes({"weight_map": {tensor: name}})
    for content in ({}, [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": 5}, {"weight_map": {"\ud800": "x"}}):
        yield f"an index that is {content!r}", writes(content)


def _of_other_files() -> Iterator[tuple[str, Mutation]]:
    def text(name: str, content: str) -> Mutation:
        def change(folder: Path, outside: Path) -> None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)

        return change

    def surrogate(folder: Path, outside: Path) -> None:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.json")).write_text("{}")
        Path(os.fsdecode(os.fsencode(folder) + b"/\xfe.safetensors")).write_text("{}")

    def unread_fifo(folder: Path, outside: Path) -> None:
        for name in ("README.md", "notes.json", "other.safetensors", "vocab.txt~"):
            os.mkfifo(folder / name)

    def templates(folder: Path, outside: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        os.mkfifo(folder / "additional_chat_templates" / "rag.jinja")

    def linked_templates(folder: Path, outside: Path) -> None:
        (folder / "additional_chat_templates").symlink_to(outside)

    def distributed(folder: Path, outside: Path) -> None:
        shutil.copyfile(outside / "model.safetensors", folder / "shard-00000-model-00000-of-00001.safetensors")

    def pickles(folder: Path, outside: Path) -> None:
        for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt"):
            (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")

    adapter = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    yield "an adapter beside it", text("adapter_config.json", adapter)
    yield "a piece with a line break", text("shard-00000-model-00000-of-00001.safetensors\n", "")
    yield "code beside it", text("modeling_llama.py", "raise SystemExit('code of the parent ran')")
    yield "a generate function", text("custom_generate/generate.py", "raise SystemExit('code of the parent ran')")
    yield "requirements", text("requirements.txt", "x")
    yield "another tokenizer", text("tokenizer.5.0.0.json", "{}")
    yield "a huge template", text("chat_template.jinja", "x" * (LIMITS["chat_template.jinja"] + 1))
    yield "names that are not UTF-8", surrogate
    yield "FIFOs that nobody reads", unread_fifo
    yield "a FIFO among the templates", templates
    yield "templates that are a link", linked_templates
    yield "a piece of a distributed checkpoint", distributed
    yield "pickles beside it", pickles
