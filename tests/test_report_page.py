"""The report's page for whole, partial, broken and hostile runs."""

import json
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from baton.report import build
from baton.report.text import compact, duration, number
from handoff.errors import UserError
from handoff.files import canonical_hash, write_json
from stages.reward_model.schema import Probe
from tests.report_run import FAMILIES, make_card, make_results, make_run, make_share, write_lines


class Document(HTMLParser):
    """The parts that tests check: ids, references to ids, addresses, elements, and the text without markup."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.addresses: set[str] = set()
        self.tags: Counter[str] = Counter()
        self._pieces: list[str] = []
        self._open = ""
        self.feed(html)
        self.text = " ".join(" ".join(self._pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name == "aria-labelledby":
                self.references.update((value or "").split())
            elif name in ("href", "xlink:href", "src"):
                self.addresses.add(value or "")
            self.references.update(re.findall(r"url\(#([^)]*)\)", value or ""))

    def handle_data(self, data: str) -> None:
        if self._open != "style":
            self._pieces.append(data)


def page_of(run: Path) -> Document:
    """The run's report, built and parsed."""
    return Document(build(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a whole run."""
    return build(make_run(tmp_path_factory.mktemp("whole")))


def test_the_report_shows_the_effect_of_alignment(whole: Path) -> None:
    page = Document(whole.read_text(encoding="utf-8"))
    assert whole == whole.parent / "report.html"
    assert "ppo raised the gold score of sft from 0.21 to 0.58 (+0.37), at 1.31 nats of KL" in page.text
    assert "exact accuracy went from 0.71 to 0.70" in page.text
    assert "dpo beats sft on 66 % of the prompts (62 % to 70 %)" in page.text
    assert "sft answers 71 % of the held-out items exactly (pretrain: 2 %)" in page.text
    for family in FAMILIES:
        assert f" {family} " in page.text
    assert "0.540 to 0.620" in page.text, "the interval of PPO's gold score"
    assert "24 Nov 2026, 10:16 UTC" in page.text and "seed 42" in page.text and "torch 2.13.0" in page.text
    assert "Missing" not in page.text and "Warnings" not in page.text


def test_the_report_is_self_contained(whole: Path) -> None:
    html = whole.read_text(encoding="utf-8")
    page = Document(html)
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert not re.search(r"https?:|@import|url\((?!#)", html), "an address outside of the page"
    assert page.tags["script"] == page.tags["img"] == page.tags["iframe"] == 0
    assert "Content-Security-Policy" in html and "default-src 'none'" in html


def test_every_reference_in_the_page_has_one_target(whole: Path) -> None:
    page = Document(whole.read_text(encoding="utf-8"))
    assert [i for i, n in Counter(page.ids).items() if n > 1] == [], "ids that occur twice"
    links = {address[1:] for address in page.addresses if address.startswith("#")}
    assert (page.references | links) <= set(page.ids)
    assert page.tags["svg"] > 15 and page.tags["desc"] == page.tags["svg"], "a drawing without a description"


def test_charts_contain_their_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path, ("tokenizer", "pretrain"))
    write_lines(
        run / "pretrain" / "metrics.jsonl", [{"step": 10, "loss": 4.5}, {"step": 20, "loss": 3.25, "eval_loss": 3.5}]
    )
    text = page_of(run).text
    assert "train 4.50 → 3.25" in text and "held out 3.50" in text
    assert "step train held out 10 4.50 – 20 3.25 3.50" in text


def test_report_of_a_run_that_has_only_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, ("tokenizer", "pretrain"))
    (run / "sft").mkdir()
    origin = {"recipe": str(tmp_path / "my own.yaml"), "overrides": ["sft.seed=1", "name=a b"]}
    write_json(run / "sft" / "started.json", {"origin": origin})
    write_lines(run / "sft" / "metrics.jsonl", [{"step": 30, "loss": 2.0}])
    monkeypatch.chdir(tmp_path)
    page = page_of(run)
    assert "2 stages are done, the last is pretrain: 1.23 held-out loss." in page.text
    assert "Nothing has been evaluated yet." in page.text
    assert "30 steps so far" in page.text and "sft · loss" in page.text, "an unfinished stage shows how far it is"
    for command in (
        "baton run 'my own.yaml' sft.seed=1 'name=a b' --to sft",
        "make ppo RECIPE='my own.yaml' SET='sft.seed=1 '\"'\"'name=a b'\"'\"''",
        "make eval RECIPE='my own.yaml'",
    ):
        assert command in page.text
    assert "make sft" not in page.text


def test_report_before_anything_was_published(tmp_path: Path) -> None:
    (tmp_path / "tiny" / "tokenizer").mkdir(parents=True)
    write_json(tmp_path / "tiny" / "tokenizer" / "started.json", {})
    text = page_of(tmp_path / "tiny").text
    assert "No stage of this run has been published yet." in text
    assert "baton run <recipe> --to tokenizer" in text, "no file says from which recipe it was begun"


def test_a_missing_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such run; make it with `baton run <recipe>`"):
        build(tmp_path / "tiny")
    (tmp_path / "tiny" / "logs").mkdir(parents=True)
    with pytest.raises(UserError, match="no stage has been started"):
        build(tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "report.html").exists()


def test_foreign_text_is_escaped(whole: Path) -> None:
    html = whole.read_bytes().decode("utf-8")  # a lone surrogate could not even be written
    assert "&lt;script&gt;alert(1)" in html and "<script" not in html and "<img" not in html
    assert "{{ 7*7 }}" in html, "a template in an answer was filled in"
    for character, shown in (("\0", "U+0000"), ("\x1b", "U+001B"), ("\u202e", "U+202E"), ("\ud800", "U+D800")):
        assert character not in html and shown in html


def test_lines_of_samples_may_hold_any_separator(tmp_path: Path) -> None:
    run = make_run(tmp_path, ("tokenizer", "pretrain", "sft"))
    rows = [{"step": step, "prompt": "p", "completion": f"one\u2028two\x85three {step}"} for step in (1, 2)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run / "sft" / "samples.jsonl").write_text(lines, encoding="utf-8")
    page = page_of(run)
    assert "three 1" in page.text and "three 2" in page.text and "Warnings" not in page.text


def test_broken_files_become_warnings(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "reward" / "stage.json").write_text('{"format_version": 1')
    with (run / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 610, "loss": NaN}\n{"step": 620, "lo')
    (run / "dpo" / "model" / "model.safetensors").write_bytes(b"\xff" * 20)
    write_json(run / "evaluate" / "results.json", {"models": "all"})
    text = page_of(run).text
    assert "stage.json, line 1: not JSON" in text
    assert "sft/metrics.jsonl: 1 of 68 lines cannot be read (the first is line 68)" in text
    assert "sft: loss was not a number in at least one step" in text
    assert "model.safetensors is truncated" in text
    assert "results.json: models: Input should be a valid list" in text
    assert "reward was started and is not finished" in text


def edit_manifest(run: Path, section: str, **changes: Any) -> None:
    """Changes fields of a published manifest; those that are mappings are merged."""
    path = run / section / "stage.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    write_json(path, {**content, "sha256": canonical_hash(content)})


def test_warnings_about_lineage_data_and_versions(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    edit_manifest(run, "sft", extra={"made": "again"}, versions={"torch": "2.12.0"})
    rows = {"data/rows_in": 100, "data/rows_used": 70, "data/dropped/too_long": 25, "data/dropped/empty_answer": 5}
    edit_manifest(run, "reward", data={"data": rows})
    edit_manifest(run, "dpo", data={"data": {"data/rows_in": 10, "data/rows_used": 9}})
    text = page_of(run).text
    assert "ppo was made from another sft than the one that is here now" in text
    assert "different versions of torch: 2.12.0, 2.13.0" in text
    assert "reward, data: 30 % of the rows were dropped, most because of: too long" in text
    assert "dpo, data: rows in are not rows used plus rows dropped" in text


def test_the_report_card_of_a_reward_model(whole: Path) -> None:
    page = Document(whole.read_text(encoding="utf-8"))
    assert "reward report card of the reward model Measured on 400 held-out pairs. Shares" in page.text
    for said in (
        "Accuracy 83 % 79 % to 87 %, held out",
        "Length alone 63 % right by taking the shorter answer",
        "Over length +0.20 accuracy less length alone",
        "Score and length −0.46",
        "Calibration error 0.031",
        "longer wins what counting tokens gets right, 400 pairs 37 % 33 % to 41 %",
        "better answer much shorter in numbers, 100 pairs 92 % 84 % to 100 %",
        "better answer about as long no such pairs",
        "repeated answers passed, 400 pairs 85 %",
        "rejected answers 400 chosen answers 400",
        "from to rejected answers chosen answers −2.00 −1.00 120 20",
        "The mean of their scores ranks 86 % of the pairs right",
        "reward_b 82 % 91 % 100 %",
    ):
        assert said in page.text.replace("\N{NO-BREAK SPACE}", " "), said
    assert {"card-1", "r3-scores-title", "r3-calibration-title"} <= set(page.ids)
    assert "#card-1" in page.addresses


def test_card_findings_are_warnings_and_a_failed_gate_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    failed = Probe(name="repeated", share=make_share(0.4), passed=False)
    card = make_card(
        findings=["ranks 83 % of the held-out pairs right, and so would length"],
        gate=["its confidence is off by 0.300 on average (ECE); max_ece is 0.1"],
        probes=[failed, Probe(name="off-topic", share=None, passed=True)],
        ensemble=None,
    )
    write_json(run / "reward" / "card.json", card.model_dump(mode="json"))
    (run / "reward" / "stage.json").unlink()
    write_json(run / "reward" / "started.json", {})
    text = page_of(run).text
    assert "reward ranks 83 % of the held-out pairs right, and so would length" in text
    assert "Not published, since it is below the gate of the recipe: its confidence is off by 0.300" in text
    assert "repeated answers failed, 400 pairs" in text and "off-topic answers no such pairs" in text
    assert "Ensemble" not in text and "reward was started and is not finished" in text


def test_a_reward_model_without_a_card_and_a_card_that_cannot_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "reward" / "card.json").write_text('{"format_version": 2}')
    text = page_of(run).text
    assert "card.json: format_version: Input should be 1; run the stage again" in text
    (run / "reward" / "card.json").unlink()
    text = page_of(run).text
    assert "reward has no report card: give it held-out pairs under eval_data" in text and "card-1" not in text


@pytest.mark.parametrize(
    ("gold", "half", "said"),
    [
        (0.1, 0.01, "ppo lowered the gold score of sft from 0.21 to 0.10 (−0.11)"),
        (0.21, 0.05, "ppo left the gold score of sft at 0.21"),
        (0.25, 0.05, "ppo moved the gold score of sft from 0.21 to 0.25 (+0.04), no clear difference"),
    ],
)
def test_verdict_claims_no_more_than_the_intervals(tmp_path: Path, gold: float, half: float, said: str) -> None:
    results = make_results()
    results["metrics"]["ppo"]["gold"]["value"] = gold
    moved = gold - 0.21
    results["changes"]["ppo"]["metrics"]["gold"] = {"value": moved, "low": moved - half, "high": moved + half, "n": 400}
    text = page_of(make_run(tmp_path, results=results)).text
    assert said in text
    assert ("over-optimisation" in text) == (gold < 0.21), "reward up and gold down has to be called by its name"


def test_scores_of_any_name_are_shown_compared_and_grouped(tmp_path: Path) -> None:
    results = make_results()
    for model, metrics in results["metrics"].items():
        own = {"value": 2.0 if model == "ppo" else 1.0, "low": 0.9, "high": 2.1, "n": 400}
        results["metrics"][model] = {"stop_rate": metrics["stop_rate"], "helpfulness": own}
    levels = {"hard": {"value": -1.0, "low": None, "high": None}, "easy": {"value": 3.0, "low": None, "high": None}}
    results["families"] = {level: dict.fromkeys(results["models"], found) for level, found in levels.items()}
    results["grouped"] = {"column": "level", "metric": "helpfulness"}
    results["win_rates"] = {"ppo": {**results["win_rates"]["ppo"], "by": "helpfulness"}}
    unclear = {"value": 1.0, "low": -0.1, "high": 2.1, "n": 400}
    results["changes"] = {"ppo": {"over": "sft", "metrics": {"helpfulness": unclear}}}
    page = page_of(make_run(tmp_path, results=results))
    assert "helpfulness by level" in page.text and "hard" in page.text and "Exact accuracy" not in page.text
    assert "ppo moved the helpfulness of sft from 1.00 to 2.00 (+1.00), no clear difference" in page.text
    assert "Helpfulness, ppo" in page.text and "Share of prompts with the better answer, by helpfulness" in page.text


def test_several_policies_and_a_parent_from_outside(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.copytree(run / "ppo", run / "grpo")
    outside = {"parent": {"path": "/models/sft", "fingerprint": "f", "name": "sft-of-others"}}
    edit_manifest(run, "grpo", name="grpo", parents=outside, created="2026-11-24T10:15:59+00:00")
    page = page_of(run)
    assert "grpo from sft-of-others and reward" in page.text and "from outside" in page.text
    assert {"section-1", "section-2", "section-1-heading", "section-2-heading"} <= set(page.ids)
    assert [i for i, n in Counter(page.ids).items() if n > 1] == []


def test_a_stage_of_an_unknown_package_has_charts_of_its_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path, ("tokenizer", "pretrain", "sft"))
    edit_manifest(run, "sft", stage="distil", recipe={"stage": "distil"})
    lines = [
        {"step": s, "loss": 3 - s / 10, "teacher/kl": 1.5 / s, "time/step": 0.1, "epoch": s / 9} for s in (1, 2, 3)
    ]
    write_lines(run / "sft" / "metrics.jsonl", [*lines, {"step": 3, "eval_loss": 2.9, "rows": 7}])
    text = page_of(run).text
    assert "sft distil" in text, "the caption of an unknown stage is its package's name"
    assert "sft · loss" in text and "sft · teacher/kl" in text
    assert "train 2.90 → 2.70" in text and "held out 2.90" in text
    for no_curve in ("sft · time/step", "sft · epoch", "sft · rows"):
        assert no_curve not in text
    assert "the last is sft: 2.70 training loss." in text


def test_an_unfinished_stage_is_known_by_the_record_of_its_start(tmp_path: Path) -> None:
    run = make_run(tmp_path, ("tokenizer", "pretrain", "sft", "reward", "ppo"))
    inputs = {"recipe": {"stage": "ppo"}, "parents": {}, "data": {}, "code": "c", "seed": 42}
    (run / "ppo").rename(run / "grpo")
    (run / "grpo" / "stage.json").unlink()
    write_json(run / "grpo" / "started.json", {"inputs": inputs})
    page = page_of(run)
    assert "grpo policy gradient, not finished" in page.text and "section-1" in page.ids
    assert "grpo was started and is not finished" in page.text and "make ppo" not in page.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.71, "0.710"), (-0.4, "−0.400"), (12.345, "12.3"), (123.4, "123"), (1234567, "1,234,567"), (0.000012, "1.2e−5"),
     (0, "0"), (0.0, "0"), (None, "–"), (math.nan, "not a number"), ("adamw", "adamw"), (9.999, "10.00")],
)  # fmt: skip
def test_numbers_are_written_readably(value: object, shown: str) -> None:
    assert number(value) == shown


def test_durations_and_counts() -> None:
    assert [duration(s) for s in (0.42, 59.4, 59.6, 133, 3840)] == [
        "0.4 s",
        "59 s",
        "1 min 00 s",
        "2 min 13 s",
        "1 h 04 min",
    ]
    assert [compact(n) for n in (7, 48_200, 1_250_000, None)] == ["7", "48.2 k", "1.25 M", "–"]
