"""Assembles the report: the content from the other modules, the layout from page.html.jinja and page.css."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from baton.report import alerts, answers, evaluation, facts, lineage, reward_card, tax
from baton.report.collect import RunData, Stage
from baton.report.curves import sections, training_charts
from baton.report.text import moment, number, visible

_SHOWN_SAMPLES = 6


def render(run: RunData) -> str:
    """The page as text, safe to write as UTF-8."""
    folder = files("baton.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=visible
    )
    environment.filters["number"] = number
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    palette = facts.colors(run)
    nodes = facts.lineage_nodes(run, palette)
    sentences = facts.sentences(run)
    evaluations = [_evaluation(stage, run, palette, place) for place, stage in enumerate(run.stages) if stage.results]
    script = (
        Markup((folder / "search.js").read_text(encoding="utf-8")) if any(e["answers"] for e in evaluations) else ""
    )
    return template.render(
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        run=run,
        verdict=sentences[0],
        findings=sentences[1:],
        tiles=facts.tiles(run),
        palette=palette,
        lineage_wide=lineage.draw(nodes, vertical=False),
        lineage_tall=lineage.draw(nodes, vertical=True),
        nodes=nodes,
        stages=facts.stage_rows(run, palette),
        facts=_when_and_with_what(run),
        training=training_charts(run.stages, palette),
        cards=reward_card.sections(run.stages, palette),
        sections=sections(run.stages, palette),
        evaluations=evaluations,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        samples=[(stage, rows) for stage in run.stages if (rows := samples_before_and_after(stage))],
        accounts=facts.accounts(run),
        warnings=alerts.warnings(run),
        gaps=facts.gaps(run),
    )


def _when_and_with_what(run: RunData) -> list[str]:
    """The small print under the headline: date, seeds, and the packages of the newest stage."""
    manifests = [stage.manifest for stage in run.published if stage.manifest]
    if not manifests:
        return []
    newest = max(manifests, key=lambda manifest: manifest.created)
    seeds = ", ".join(str(seed) for seed in sorted({manifest.seed for manifest in manifests}))
    versions = [f"{package} {version}" for package, version in newest.versions.items()]
    return [moment(newest.created), f"seed {seeds}", *versions]


def _evaluation(stage: Stage, run: RunData, palette: Mapping[str, str], place: int) -> dict[str, Any]:
    assert stage.results is not None
    tasks = [
        {
            "name": task.name,
            "about": task.about,
            "models": task.models,
            "table": evaluation.metric_table(task),
            "changes": evaluation.change_table(task),
            "heat": evaluation.heat_table(task),
            "heat_title": evaluation.heat_title(task),
            "wins": evaluation.wins(task),
            "judges": evaluation.judges(task),
            "samples": task.samples,
        }
        for task in stage.results.tasks.values()
    ]
    folder = stage.failed.path if stage.failed is not None and stage.manifest is None else run.path / stage.name
    more = {
        "answers": answers.tables(stage, folder, run.path),
        "tax": tax.charts(f"tax-{place}", stage.results, palette),
    }
    return {
        **more,
        "name": stage.name,
        "comparisons": stage.results.comparisons,
        "tasks": tasks,
        "gates": stage.results.gates,
    }


def samples_before_and_after(stage: Stage) -> list[dict[str, Any]]:
    """The earliest and the latest answer to the first few prompts of samples.jsonl, if they are of different steps."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in stage.samples:
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = []
    for prompt, rows in by_prompt.items():
        first, last = min(rows, key=lambda row: row["step"]), max(rows, key=lambda row: row["step"])
        if first["step"] < last["step"]:
            pairs.append({"prompt": prompt, "first": first, "last": last})
    return pairs[:_SHOWN_SAMPLES]
