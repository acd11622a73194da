"""Exports for Ollama, vLLM and onnxruntime."""

import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baton.export import ollama, onnx_file
from baton.export.check import CheckFailed, Expected
from baton.export.record import read_record
from baton.export.run import export
from baton.export.source import Source
from data.encode import Encoder
from data.rendering import Renderer
from handoff.errors import HandoffError
from tests.go_template import render
from tests.test_chat_templates import LLAMA2, MARKERS, NAMES, TEMPLATES
from tests.test_data_encode import CHATML, make_tokenizer
from training.recipe import load_recipe

pytestmark = pytest.mark.slow  # models are trained and loaded again

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named {{ SmolLM }}<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def quiet(line: str) -> None:
    """What `export` says is in the record, too."""


def encoder(template: str) -> Encoder:
    return Encoder(
        make_tokenizer(list(dict.fromkeys([*NAMES.values(), *MARKERS.findall(template)])), template, **NAMES)
    )


def test_the_reader_of_go_templates_reads_what_its_documentation_says():
    text = '{{- if eq .Role "a" "b" -}} x {{- else if not .Content }}y{{ else }}z{{ end -}} \n'
    pieces = "{{ range $i, $m := .Messages }}" + text + "{{ end }}{{ len (slice .Messages 1) }}"
    assert (
        render(pieces, [{"role": "b", "content": ""}, {"role": "c", "content": ""}, {"role": "c", "content": "1"}])
        == "xyz2"
    )


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, LLAMA2, TEMPLATES["qwen2_5"], TEMPLATES["phi3"]])
def test_ollamas_template_renders_50_chats_as_the_chat_template_does(template):
    made = encoder(template)
    text = ollama.learn(made).go()
    renderer = Renderer(template, made.tokenizer.special_tokens_map)
    talks = ollama.conversations()
    assert len(talks) == 50 and {turns[0]["role"] for turns in talks} == {"system", "user"}
    assert {len(turns) for turns in talks} >= {1, 2, 3, 4, 5}
    for turns, wanted in zip(talks, renderer([(turns, True, None) for turns in talks]), strict=True):
        assert render(text, turns) == wanted


def test_a_template_that_is_more_than_texts_around_messages_is_refused():
    with pytest.raises(HandoffError, match="more than texts around messages"):
        ollama.learn(encoder(CHATML.replace("{{", "{{ loop.index }}{{", 1)))
    dated = CHATML.replace("{%", "{{ strftime_now('%d %b %Y') }}{%", 1)
    with pytest.raises(HandoffError, match="reads the date"):
        ollama.learn(encoder(dated))


def test_a_modelfile_lies_beside_the_gguf_file(micro_recipe, tmp_path):
    folder = export(f"{micro_recipe}:sft", "ollama", None, tmp_path / "out", quiet, check=False)
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./micro-sft-f16.gguf" and (folder / "micro-sft-f16.gguf").is_file()
    assert lines[2:] == ['PARAMETER stop """<|end|>"""', 'PARAMETER stop """<|eos|>"""']
    template = lines[1].removeprefix('TEMPLATE """').removesuffix('"""')
    tokenizer = AutoTokenizer.from_pretrained(load_recipe(micro_recipe).run_dir / "sft" / "model")
    turns = ollama.conversations()[4]
    wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(template, turns) == wanted and "ollama create micro-sft" in (folder / "README.md").read_text()


def test_onnx_answers_within_1e_4_at_any_number_of_rows_and_tokens(micro_recipe, tmp_path):
    run = load_recipe(micro_recipe).run_dir
    folder = export(f"{run}:sft", "onnx", None, tmp_path / "out", quiet)
    record = read_record(folder)
    assert record.check is not None and record.check.numbers["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    model = AutoModelForCausalLM.from_pretrained(run / "sft" / "model")
    for shape in ((1, 1), (3, 7)):
        ids = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(1))
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones(shape, np.int64)})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(ids).logits, atol=1e-4, rtol=0)
    assert (folder / "tokenizer.json").is_file() and (folder / "README.md").is_file()
    model = Source.open(f"{run}:sft").load("auto")
    expected = Expected.of(model)
    with torch.no_grad():
        model.module.get_input_embeddings().weight[7:] += 0.01
    with pytest.raises(CheckFailed, match=r"onnxruntime .* answers otherwise than the stage"):
        onnx_file.check_onnx(model, folder, expected)


def test_vllm_gets_the_directory_with_the_command_that_serves_it(micro_recipe, tmp_path):
    folder = export(f"{micro_recipe}:sft", "vllm", None, tmp_path / "out", quiet, check=False)
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    done = subprocess.run([str(folder / "serve.sh"), "--port", "1"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"serve {folder} --served-model-name micro-sft --port 1\n"
    assert (folder / "model.safetensors").is_file() and Path(folder / "config.json").is_file()
