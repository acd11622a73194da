"""Multiple choice: rows in the forms in which they are published, and the numbers of lm-evaluation-harness."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from data.accounting import Accounting
from data.config import FileSource
from data.encode import Encoder
from data.errors import DataError
from data.load import read
from data.records import Chat, Origin, Question
from handoff.errors import UserError
from stages.evaluate import choices, likelihood, trees
from stages.evaluate.answers import read as read_answers
from stages.evaluate.config import Config
from stages.evaluate.tasks import ChoicesTask
from tests.test_data_encode import own
from tests.test_families import publish
from training.recipe import RecipeError, load_recipe
from training.run import run_section

COLOURS = ["red", "dark blue", "green"]
FORMS = {
    "mmlu": {"question": "Which?", "subject": "colours", "choices": COLOURS, "answer": 1},
    "arc": {"id": "a", "question": "Which?", "choices": {"text": COLOURS, "label": ["A", "B", "C"]}, "answerKey": "B"},
    "arc, numbers": {"question": "Which?", "choices": {"text": COLOURS, "label": ["1", "2", "3"]}, "answerKey": "2"},
    "hellaswag": {"ind": 4, "ctx": "Which?", "endings": COLOURS, "label": "1"},
    "gold": {"query": "Which?", "choices": COLOURS, "gold": 1},
    "a letter": {"question": "Which?", "choices": COLOURS, "answer": "b"},
}


def questions(folder, rows, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    accounting = Accounting()
    source = FileSource(source="file", path=str(path), **settings)
    return list(read([source], Question, None, 0, accounting)), accounting


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_published_forms_are_read(tmp_path, row):
    (found,), _ = questions(tmp_path, [row])
    assert (found.text, found.choices, found.right) == ("Which?", tuple(COLOURS), 1)


@pytest.mark.parametrize(
    "broken",
    [{"answer": 3}, {"answer": -1}, {"answer": "D?"}, {"answer": True}, {"choices": ["red", "red"]},
     {"choices": ["red", " "]}, {"question": " "}],
)  # fmt: skip
def test_rows_without_one_right_answer_are_dropped_and_counted(tmp_path, broken):
    found, accounting = questions(tmp_path, [FORMS["mmlu"], FORMS["mmlu"] | broken])
    assert len(found) == 1 and sum(accounting.dropped.values()) == 1


def test_what_is_no_list_of_choices_is_an_error_that_names_the_row(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: the choices are no list of texts"):
        questions(tmp_path, [FORMS["mmlu"] | {"choices": [1, 2]}])
    with pytest.raises(DataError, match=r"rows.jsonl:1: the choices are no list of texts"):
        questions(tmp_path, [FORMS["arc"] | {"choices": {"text": COLOURS, "label": ["A"]}}])


def test_choices_are_no_conversations_and_conversations_no_choices(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FORMS["mmlu"]) + "\n")
    with pytest.raises(DataError, match="holds questions with answers to choose from"):
        list(read([FileSource(source="file", path=str(path))], Chat, None, 0, Accounting()))
    with pytest.raises(DataError, match="holds conversations; wanted are records of kind Question"):
        questions(tmp_path, [{"prompt": "Hello", "completion": "Good day"}])


def test_a_prompt_without_the_question_is_refused():
    data = [{"source": "world", "kind": "prompts"}]
    task = {"name": "arc", "kind": "choices", "data": data}
    for prompt, message in (
        ("Answer:", r"write .question. where"),
        ("{question} {answer}", r"would show the models the right answer.*\{\{answer\}\}"),
    ):
        with pytest.raises(ValueError, match=message):
            ChoicesTask.model_validate(task | {"prompt": prompt})
    with pytest.raises(ValueError, match=r"needs .choices. in `prompt`"):
        ChoicesTask.model_validate(task | {"answer": "letter"})
    with pytest.raises(ValueError, match="two tasks are called arc"):
        Config.model_validate({"models": ["sft"], "tasks": [task, {"name": "arc", "data": data}]})


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_likelihoods_are_those_of_each_choice_read_alone(end, micro_recipe):
    """A row by itself, cut where lm-evaluation-harness cuts (`_encode_pair`), and a softmax in double precision."""
    folder = load_recipe(micro_recipe).run_dir / "sft" / "model"
    model, encoder = AutoModelForCausalLM.from_pretrained(folder).eval(), Encoder.from_pretrained(folder)
    rows = [
        Question("Which cup?", ("red", "dark blue", "a"), 0, Origin("x", 1)),
        Question("Where is Mira now?", ("in", "up"), 1, Origin("x", 2)),
    ]
    keys = {"name": "cups", "kind": "choices", "data": [{"source": "world", "kind": "prompts"}]}
    task = ChoicesTask.model_validate(keys | {"prompt": "Q: {question}\nA:" + end})
    pairs, expected = [], []
    for row in rows:
        one = choices.asked(task, (), row)
        pairs += choices.encode(encoder, one.before, one.options)
        for choice in row.choices:
            tokenize = encoder.tokenizer
            context, whole = (
                tokenize(text).input_ids for text in (f"Q: {row.text}\nA:", f"Q: {row.text}\nA:{end} {choice}")
            )
            with torch.no_grad():
                logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            expected.append(sum(logp[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    found = likelihood.of_pairs(model, encoder, pairs, 2)
    assert found == pytest.approx(expected, rel=1e-5)
    together = trees.of_choices(model, encoder, [pairs[:3], pairs[3:]], 8)
    assert [value for row in together for value in row] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3", "Gemma 3"])
def test_the_text_before_choices_is_computed_once_where_the_attention_allows_it(family, tmp_path, monkeypatch):
    """Gemma 3 has layers that see a window, so each choice is read behind a text of its own."""
    publish(tmp_path, family)
    model, encoder = AutoModelForCausalLM.from_pretrained(tmp_path).eval().float(), Encoder.from_pretrained(tmp_path)
    rows = [choices.encode(encoder, "Where is " * n + "it?", ["in the box", "here", "a"]) for n in (1, 7, 3)]
    expected = [likelihood.of_pairs(model, encoder, row, 8) for row in rows]
    seen: list[int] = []
    inner = model.forward
    monkeypatch.setattr(model, "forward", lambda **keys: seen.append(keys["input_ids"].numel()) or inner(**keys))
    done: list[int] = []
    found = trees.of_choices(model, encoder, rows, 6, done.append)
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)
    assert sum(done) == 9
    whole = sum(len(before) + len(scored) - 1 for row in rows for before, scored in row)
    assert (sum(seen) < 0.8 * whole + 40) == (family == "Qwen3")


class Blind(LlamaForCausalLM):
    """A model whose attention takes no mask: every token sees all before it, as in one that reads with a state."""

    def forward(self, attention_mask=None, **keys):
        return super().forward(**keys)


@pytest.mark.parametrize("first", [[[8], [9]], [[8, 9], [10, 11]]], ids=["of one token", "of two"])
def test_a_model_that_ignores_the_mask_reads_each_choice_by_itself(first):
    """Whatever the first question is like: choices of one token do not tell, since none of them is read."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = own()
    model = Blind(LlamaConfig(vocab_size=encoder.vocab_size, **sizes)).eval()
    rows = [
        [([5, 6, 7], one) for one in first],
        [([5, 6, 7, 8], [12, 13, 14]), ([5, 6, 7, 8], [15, 16])],
    ]
    found = [trees.of_choices(model, encoder, [row], 1)[0] for row in rows]
    assert found == [pytest.approx(likelihood.of_pairs(model, encoder, row, 1)) for row in rows]


def test_the_norm_divides_by_the_choices_characters():
    row = choices.Asked("Which?", ("a", "a long answer"), 1)
    found = choices.right([row, row], [[-2.0, -3.0], [-2.0, -26.1]])
    assert found["accuracy"].values == [0.0, 0.0] and found["accuracy_norm"].values == [1.0, 0.0]


@pytest.mark.slow
def test_the_stage_reports_both_accuracies(micro_recipe, tmp_path):
    rows = tmp_path / "arc.jsonl"
    rows.write_text("".join(json.dumps(FORMS["arc"]) + "\n" for _ in range(5)))
    path = tmp_path / "micro.yaml"
    path.write_text(micro_recipe.read_text() + (
        "  evaluate:\n    models: [pretrain, sft]\n    tasks:\n"
        f"      - {{name: arc, kind: choices, data: [{{source: file, path: {rows}}}]}}\n"
    ))  # fmt: skip
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())["tasks"]["arc"]
    for model in ("pretrain", "sft"):
        assert results["metrics"][model]["accuracy"]["n"] == results["metrics"][model]["accuracy_norm"]["n"] == 5
        assert results["metrics"][model]["accuracy"]["value"] in (0.0, 1.0), "five equal rows"
    kept = [row for row in read_answers(recipe.run_dir / "evaluate").to_pylist() if row["model"] == "sft"]
    assert len(kept) == 5
    for row in kept:
        assert row["options"] == COLOURS and row["reference"] == "dark blue" and row["right"] == 1
        assert row["answer"] == COLOURS[row["choice"]] and np.argmax(row["log_likelihoods"]) == row["choice"]
        assert dict(row["scores"])["accuracy"] == float(row["choice"] == 1)
    path.write_text(path.read_text().replace("name: arc,", "name: arc, prompt: 'Q',"))
    with pytest.raises(UserError, match=r"write .question. where"):
        load_recipe(path)


@pytest.mark.slow
def test_a_question_beyond_a_models_window_is_an_error_before_any_model_answers(micro_recipe, tmp_path, monkeypatch):
    """GPT-2 has an embedding for each position, so a longer row would end in an index error."""
    folder = load_recipe(micro_recipe).run_dir / "sft" / "model"
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    short = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=48, n_embd=16, n_layer=1, n_head=2, **ends))
    short.save_pretrained(tmp_path / "short")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "short")
    long = FORMS["mmlu"] | {"question": "Which cup has Mira now, and where is it? " * 9}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (FORMS["mmlu"], long)))
    path = tmp_path / "micro.yaml"
    path.write_text(micro_recipe.read_text() + (
        f"  evaluate:\n    models: [sft, {tmp_path / 'short'}]\n    tasks:\n"
        f"      - {{name: which, kind: choices, data: [{{source: file, path: {rows}}}]}}\n"
    ))  # fmt: skip
    monkeypatch.setattr("stages.evaluate.train.Model", None)
    with pytest.raises(RecipeError, match=r"rows.jsonl:2 takes \d+ tokens with a choice, and short reads 48 .n_pos"):
        run_section(load_recipe(path), "evaluate")
