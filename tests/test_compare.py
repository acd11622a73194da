"""`baton compare`, and the report's answers and tax curve: what they show of an evaluation's answers, and what not."""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from baton.cli import main
from baton.report import build
from baton.report.answers import ROWS
from data.records import Message
from stages.evaluate.answers import Answer, write
from tests.report_browser import Page
from tests.report_run import HOSTILE, MODELS, make_results, make_run

BITS = {"pretrain": 1.0, "sft": 1.2, "dpo": 1.25, "ppo": 1.5}
RIGHT = {"pretrain": 0.1, "sft": 0.8, "dpo": 0.8, "ppo": 0.6}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def estimate(value):
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 100}


def answers(items):
    """`ppo` is worse than `sft` in every fifth item and better in item 1."""
    for model in MODELS:
        for i in range(items):
            score = {"sft": float(i != 1), "ppo": float(i % 5 > 0)}.get(model, 0.0)
            text = HOSTILE.replace("\ud800", "") if i == 0 and model == "ppo" else f"{model} says {i}"
            prompt = [{"role": "user", "content": f"What is {i}?\nSay it."}]
            yield answer(model, i, prompt, text, {"accuracy": score, "stop_rate": 1.0})
        yield Answer(task="text", item=0, model=model, kind="document", scores={"bits_per_byte": BITS[model]})


def answer(model, item, prompt, text, scores):
    turns = [Message(one["role"], one["content"]) for one in prompt]
    return Answer(task="world", item=item, model=model, kind="greedy", prompt=turns, answer=text, scores=scores)


def evaluated(root, items=40):
    """A run whose evaluation has kept its answers."""
    run = make_run(root)
    changes = {
        model: {"over": over, "metrics": {"bits_per_byte": estimate(BITS[model] - BITS[over])}}
        for model, over in (("sft", "pretrain"), ("dpo", "sft"), ("ppo", "sft"))
    }
    text = {
        "kind": "documents",
        "models": MODELS,
        "metrics": {model: {"bits_per_byte": estimate(value)} for model, value in BITS.items()},
        "changes": changes,
    }
    choices = {
        "kind": "choices",
        "models": MODELS,
        "metrics": {model: {"accuracy": estimate(value)} for model, value in RIGHT.items()},
    }
    tasks = {"world": make_results(), "text": text, "arc": {"changes": {}, **choices}}
    gates = [
        {"metric": "bits_per_byte", "task": "text", "model": "ppo", "passed": False, "said": "text, ppo: it is 1.5"},
        {"metric": "bits_per_byte", "task": "text", "model": "sft", "passed": True, "said": "text, sft: it is 1.2"},
    ]
    whole = {"models": MODELS, "comparisons": 3, "tasks": tasks, "gates": gates}
    (run / "evaluate" / "results.json").write_text(json.dumps(whole))
    write(run / "evaluate" / "answers.arrow", answers(items))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def html(run):
    return build(run).read_text(encoding="utf-8")


@pytest.fixture
def baton(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["baton", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out + said.err

    return call


def test_where_the_later_model_became_worse_comes_first_with_prompt_answers_and_scores(run, baton):
    code, out = baton(run, "sft", "ppo", "--task", "world", "--limit", 0)
    assert code == 0 and re.search(r"world +accuracy +8 +1 +31\b", out)
    order = [int(n) for n in re.findall(r"^world (\d+)", out, re.M)]
    assert order[:4] == [0, 5, 10, 15] and order[-1] == 1 and len(order) == 40
    first = out[out.index("world 5") : out.index("world 10")]
    assert "What is 5?\n    Say it." in first and "sft says 5" in first and "ppo says 5" in first
    assert "accuracy −1" in first and "sft (accuracy 1.00, stop_rate 1.00):" in first


def test_only_the_worse_ones_and_no_more_than_asked(run, baton):
    _, out = baton(run, "sft", "ppo", "--worse", "--limit", 3)
    assert re.findall(r"^(world \d+|text \d+)", out, re.M) == ["world 0", "world 5", "world 10"]
    assert "6 more are left out" in out  # more bits a byte are worse, too
    assert re.search(r"text +bits_per_byte +1 +0 +0\b", out)


def test_control_characters_of_an_answer_are_shown(run, baton):
    _, out = baton(run, "sft", "ppo", "--limit", 1)
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b[31m" in out and "\\u202e" in out


def test_pairs_as_json_lines(run, baton):
    _, out = baton(run, "sft", "ppo", "--worse", "--task", "world", "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["item"] for one in found] == [*range(0, 40, 5)] and found[1]["before"] == "sft says 5"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sft", "pppo"), "no model pppo, did you mean ppo?"),
        (("sft", "ppo", "--task", "word"), "no task word, did you mean world?"),
        (("sft", "ppo", "--evaluation", "other"), "no evaluation other; there are evaluate"),
    ],
)
def test_what_is_not_there_is_named(run, baton, arguments, said):
    code, out = baton(run, *arguments)
    assert code == 2 and said in out


def test_a_run_without_answers_says_so(tmp_path, baton):
    code, out = baton(make_run(tmp_path), "sft", "ppo")
    assert code == 2 and "has no answers.arrow; run the evaluation again" in out
    code, out = baton(make_run(tmp_path / "other", ("tokenizer",)), "sft", "ppo")
    assert code == 2 and "has no evaluation; `baton run` makes one" in out


def test_the_report_shows_a_bounded_table_of_answers_and_says_what_is_left_out(run, html):
    body = html[html.index('<table class="compared" id="answers-1-3">') :]
    rows = re.findall(r'<tr class="(worse|better|equal)"><th scope="row">(\w+ \d+)', body[: body.index("</table>")])
    assert len(rows) == ROWS // 2 + 1 and rows[0] == ("worse", "world 0") and ("worse", "text 0") in rows
    assert f"{40 + 1 - len(rows)} more are left out" in html
    assert f"baton compare {run.resolve()} sft ppo --evaluation evaluate --limit 0" in html
    assert "ppo says 5" in body and "alert(1)</script>" not in html


def test_the_only_script_is_ours_and_nothing_else_may_run(html):
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    own = (Path(__file__).parent.parent / "baton" / "report" / "search.js").read_text()
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert script == own and f"script-src 'sha256-{digest}'" in html
    assert not re.search(r"https?:|@import", html)


def test_the_tax_curve_has_every_model_and_its_interval(html):
    tax = html[html.index("Alignment tax") : html.index('id="task-1-1-heading"')]
    assert "text: bits per byte" in tax and "arc: accuracy" in tax and "lower is better" in tax
    for model, value in BITS.items():
        assert re.search(rf"<td>{model}</td><td>\S+</td><td>{value:.2f}\d*</td><td>{value - 0.05:.2f}", tax), model
    assert "<td>ppo</td><td>sft</td>" in tax


def test_the_gate_is_shown(html):
    assert '<li class="failed"><b>not passed</b> text, ppo: it is 1.5</li>' in html
    assert '<li class="passed"><b>passed</b> text, sft: it is 1.2</li>' in html


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium to search with; `apt-get install chromium` brings one")
def test_the_table_is_searched_in_a_browser(run, html, tmp_path):
    page = Page(CHROMIUM, tmp_path / "profile")
    try:
        page.open(run / "report.html", 1280, False)
        shown = "[...document.querySelectorAll('#answers-1-3 tbody tr')].filter(e => !e.hidden).length"
        field = "document.querySelector('[data-search=\"answers-1-3\"] input')"
        changed = "dispatchEvent(new Event('input', {bubbles: true}))"
        assert page.run(shown) == 31
        page.run(f"{field}.value = 'SAYS 15'; {field}.{changed}")
        assert page.run(shown) == 1
        box = field.replace("input'", "input[type=checkbox]'")
        page.run(f"{field}.value = ''; {box}.checked = true; {box}.{changed}")
        assert page.run(shown) == 9
        assert page.run("document.querySelector('[data-search=\"answers-1-3\"] output').textContent") == "9 of 31"
    finally:
        page.close()
