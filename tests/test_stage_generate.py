"""The stage that publishes sampled answers as rows, and a chain that reads them: sft -> generate -> sft."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import stages.generate.train as generate_train
from baton.runner import check_data
from baton.status import State, overview, standing
from data.errors import DataError
from data.records import Message
from handoff.errors import HandoffError
from handoff.journal import Journal
from handoff.manifest import Manifest
from handoff.stage import StageDir
from handoff.verify import lineage, verify_run
from reward.compose import Answers
from stages.generate.config import Config
from stages.generate.train import _rows, choose
from tests.launching import grouped
from tests.stage_chain import chain, runs
from training.inputs import stage_inputs
from training.recipe import Recipe, RecipeError, load_recipe
from training.run import run_section

RECIPE = """
name: best
seed: 3
data_root: {data}
output_root: {root}
stages:
  generate:
    parent: {sft}
    data: [{{source: file, path: held_chats.jsonl, limit: 12}}]
    num_generations: 4
    scores:
      - {{function: tests.test_stage_generate:brief}}
      - {{function: length_penalty, weight: 0.1, args: {{free: 4}}}}
    keep: all
    unfinished: keep
    max_new_tokens: 8
    batch_size: 4
  sft2:
    stage: sft
    parent: {sft}
    max_length: 64
    data: [{{source: stage, name: generate}}]
    eval_data: [{{source: file, path: held_chats.jsonl}}]
    max_new_tokens: 8
    train: {{learning_rate: 1.0e-3, max_steps: 2, global_batch_size: 8, logging_steps: 1}}
"""


def brief(prompts, completions, reference, **columns):
    """1 where the answer is no longer than the conversation's own; which the column `reference` has."""
    return [float(len(c) <= len(r)) for c, r in zip(completions, reference, strict=True)]


def recipe_at(root: Path, *overrides: str) -> Recipe:
    path = root / "best.yaml"
    path.write_text(RECIPE.format(data=chain().parent, root=root / "runs", sft=runs() / "tiny" / "sft"))
    return load_recipe(path, overrides)


def rows_of(recipe: Recipe) -> list[dict]:
    text = (recipe.run_dir / "generate" / "data" / "rows.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def manifest_of(recipe: Recipe, name: str) -> Manifest:
    manifest = StageDir(recipe.run_dir / name).manifest()
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Recipe:
    recipe = recipe_at(tmp_path_factory.mktemp("generate"))
    run_section(recipe, "generate")
    return recipe


# ---- configuration


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": "best"}, "chooses by score"),
        ({"min_score": 1.0}, "`min_score` is not read without `scores`"),
        ({"temperature": 0.0}, "set num_generations to 1"),
        ({"temperature": 0.0, "num_generations": 1, "top_p": 0.9}, "not read where temperature is 0"),
        ({"scores": [{"function": "exact_match"}, {"function": "exact_match"}]}, "two rewards of the same name"),
    ],
)
def test_keys_that_would_not_be_read_are_refused(keys, message):
    data = [{"source": "world", "kind": "prompts"}]
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"parent": "sft", "data": data, **keys})


# ---- choosing


def config(**keys) -> Config:
    scores = [{"function": "exact_match"}]
    data = [{"source": "world", "kind": "prompts"}]
    return Config.model_validate({"parent": "sft", "data": data, "num_generations": 3, "scores": scores, **keys})


def test_the_best_finished_answer_of_each_prompt_is_kept_and_the_first_of_equals():
    stopped = [True, True, True, False, True, True, True, True, True]
    total = [0.0, 1.0, 1.0, 9.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    assert choose(config(keep="best"), stopped, total) == (
        [1, 4, 6],
        {"unfinished": 1, "below min_score": 0, "not the best": 5},
    )
    assert choose(config(keep="best", min_score=0.5), stopped, total)[0] == [1, 4]
    assert choose(config(keep="best", unfinished="keep"), stopped, total)[0] == [1, 3, 6]


def test_all_answers_are_kept_but_for_the_unfinished_and_the_poor():
    stopped, total = [True, False, True], [0.0, 1.0, 1.0]
    assert choose(config(), stopped, total) == ([0, 2], {"unfinished": 1, "below min_score": 0, "not the best": 0})
    kept, dropped = choose(config(min_score=0.5, unfinished="keep"), stopped, total)
    assert (kept, dropped["below min_score"]) == ([1, 2], 1)
    assert choose(config(scores=[]), stopped, None)[0] == [0, 2]


def test_rows_keep_the_prompts_columns_but_for_those_that_would_be_misread():
    answers = Answers(
        prompts=[(Message("system", "s"), Message("user", "q"))] * 3,
        prompt_ids=[[1]] * 3,
        texts=["a", "b", "c"],
        ids=[[2], [3, 4], [5]],
        stopped=[True, False, True],
        columns=[{"answer": 7, "label": False, "score": 9, "messages": []}] * 3,
    )
    rows = list(_rows(config(), answers, [0.5, 1.5, 2.5], {"x": [None, 1.0, 2.0]}, [1]))
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b"},
    ]
    assert rows == [{"messages": turns, "answer": 7, "sample": 1, "stopped": False, "score": 1.5, "scores": {"x": 1.0}}]
    plain = list(_rows(config(scores=[]), answers, None, {}, [0]))
    assert plain == [
        {"messages": [*turns[:2], {"role": "assistant", "content": "a"}], "answer": 7, "sample": 0, "stopped": True}
    ]


# ---- the stage


@pytest.mark.slow
def test_rows_are_conversations_with_columns_and_scores(made):
    rows, manifest = rows_of(made), manifest_of(made, "generate")
    assert manifest.kind == "dataset" and manifest.tokenizer is None and list(manifest.files) == ["data/rows.jsonl"]
    assert len(rows) == 48 and [row["sample"] for row in rows] == [0, 1, 2, 3] * 12
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        answer = row["messages"][-1]["content"]
        assert row["scores"]["brief"] == float(len(answer) <= len(row["reference"]))
        assert row["score"] == pytest.approx(row["scores"]["brief"] + 0.1 * row["scores"]["length_penalty"])
    metrics = manifest.metrics
    assert metrics["rows"] == metrics["answers"] == 48
    assert metrics["stop_rate"] == sum(row["stopped"] for row in rows) / 48
    assert metrics["score"] == pytest.approx(sum(row["score"] for row in rows) / 48)
    assert metrics["scores/brief"] == sum(row["scores"]["brief"] for row in rows) / 48
    assert len({row["messages"][-1]["content"] for row in rows[:4]}) > 1, "samples of a prompt differ"
    assert sorted(path.name for path in (made.run_dir / "generate").iterdir()) == sorted(
        [".lock", "data", "samples.jsonl", "stage.json", "started.json"]
    )


@pytest.mark.slow
def test_the_best_rows_are_the_best_of_all_rows(made, tmp_path):
    best = recipe_at(tmp_path, "generate.keep=best", "generate.min_score=0.5")
    run_section(best, "generate")
    every = rows_of(made)
    wanted = []
    for start in range(0, len(every), 4):
        group = [row for row in every[start : start + 4] if row["score"] >= 0.5]
        if group:
            wanted.append(max(group, key=lambda row: (row["score"], -row["sample"])))
    assert 0 < len(wanted) < 12
    assert rows_of(best) == wanted
    metrics = manifest_of(best, "generate").metrics
    assert metrics["rows"] == len(wanted) and metrics["kept/score"] >= 0.5
    assert metrics["rows"] + metrics["dropped/below_min_score"] + metrics["dropped/not_the_best"] == 48


@pytest.mark.slow
def test_nothing_left_is_an_error_that_says_why_and_publishes_nothing(tmp_path):
    recipe = recipe_at(tmp_path, "generate.min_score=5")
    with pytest.raises(DataError, match=r"generate: none of 48 answers is left \(.*below min_score: 48.*min_score"):
        run_section(recipe, "generate")
    assert StageDir(recipe.run_dir / "generate").manifest() is None


@pytest.mark.slow
@pytest.mark.slow
def test_prompts_whose_gold_answer_no_score_can_read_are_listed_counted_and_left_out(tmp_path, capsys):
    rows = [{"prompt": f"What is {n} + {n}?", "answer": answer} for n, answer in enumerate(["0", "??", "4"])]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = f"[{{source: file, path: {tmp_path / 'sums.jsonl'}}}]"
    recipe = recipe_at(
        tmp_path, f"generate.data={data}", "generate.scores=[{function: math_equal}]", "generate.num_generations=1"
    )
    run_section(recipe, "generate")
    assert [row["answer"] for row in rows_of(recipe)] == ["0", "4"]
    said = " ".join(capsys.readouterr().out.split())
    assert "sums.jsonl:2: the gold answer '??' is neither a formula nor a word" in said
    counts = manifest_of(recipe, "generate").data["prompts"]
    assert counts["data/rows_used"] == 2 and counts["data/dropped/a_gold_answer_that_math_equal_cannot_read"] == 1


def test_batches_change_no_row(made, tmp_path):
    other = recipe_at(tmp_path, "generate.batch_size=7")
    run_section(other, "generate")
    assert rows_of(other) == rows_of(made)


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_behind_the_finished_prompts(made, tmp_path, monkeypatch, capsys):
    recipe = recipe_at(tmp_path)
    real, calls = generate_train.generate, []

    def interrupted(model, prompts, *rest):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return real(model, prompts, *rest)

    monkeypatch.setattr(generate_train, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_section(recipe, "generate")
    journal = recipe.run_dir / "generate" / "answers.jsonl"
    assert len(Journal(journal).lines()) == 2
    with journal.open("a") as file:
        file.write('{"step": 12, "answ')  # as a kill may leave it

    after = []
    monkeypatch.setattr(generate_train, "generate", lambda m, p, *rest: after.append(len(p)) or real(m, p, *rest))
    run_section(recipe, "generate")
    assert sum(calls) + sum(after) == 48 and calls == [16, 16] and after == [16]
    assert "8 of 12 prompts were answered before" in capsys.readouterr().out
    assert rows_of(recipe) == rows_of(made)
    assert not journal.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no JSON", "another answer"])
def test_a_damaged_line_costs_its_own_answers_alone(damage, made, tmp_path, monkeypatch, capsys):
    recipe = recipe_at(tmp_path)
    real = generate_train.generate

    def interrupted(model, prompts, *rest):
        if calls == [16, 16]:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return real(model, prompts, *rest)

    calls: list[int] = []
    monkeypatch.setattr(generate_train, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_section(recipe, "generate")
    journal = recipe.run_dir / "generate" / "answers.jsonl"
    first, second = journal.read_text().splitlines(keepends=True)
    if damage == "no JSON":
        first = first.replace('"answers": [[', '"answers": [,[')
    else:
        line = json.loads(first)
        line["answers"][0][0][0] ^= 1
        first = json.dumps(line) + "\n"
    journal.write_text(first + second)

    # The next start is interrupted, too; then nothing but the missing prompts is answered.
    calls = [16]
    with pytest.raises(KeyboardInterrupt):
        run_section(recipe, "generate")
    assert "4 of 12 prompts were answered before" in capsys.readouterr().out
    calls = []
    run_section(recipe, "generate")
    assert calls == [16]
    assert "8 of 12 prompts were answered before" in capsys.readouterr().out
    assert rows_of(recipe) == rows_of(made)


@pytest.mark.slow
def test_a_killed_stage_goes_on_and_publishes_the_same_rows(made, tmp_path, root):
    recipe = recipe_at(tmp_path)
    code = (
        "import os, signal\nfrom training.run import main\nfrom handoff.journal import Journal\n"
        "real = Journal.append\n"
        "def append(self, lines):\n"
        "    real(self, lines)\n"
        "    if self.path.name == 'answers.jsonl': os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.append = append\n"
        f"main('generate', [{str(recipe.path)!r}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert StageDir(recipe.run_dir / "generate").manifest() is None
    assert str(standing(recipe, "generate")) == "unfinished: continues after the 1 line of answers.jsonl"
    run_section(recipe, "generate")
    assert rows_of(recipe) == rows_of(made)
    assert manifest_of(recipe, "generate").fingerprint == manifest_of(made, "generate").fingerprint


@pytest.mark.slow
def test_two_processes_publish_the_same_rows(made, tmp_path, root):
    recipe = recipe_at(tmp_path)
    done = grouped(root, "cpu2", "stages.generate", recipe.path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest_of(recipe, "generate").engine.processes == 2
    assert rows_of(recipe) == rows_of(made)


# ---- reading the rows


@pytest.mark.slow
def test_a_section_reads_the_rows_as_its_parent(made):
    assert made.sections["sft2"].parents["data:generate"] == "generate"
    assert made.order(["sft2"]) == ["generate", "sft2"]
    assert overview(made)["sft2"].state is State.NEW
    run_section(made, "sft2")
    manifest = manifest_of(made, "sft2")
    rows = manifest_of(made, "generate")
    assert manifest.parents["data:generate"].fingerprint == rows.fingerprint
    assert manifest.parents["data:generate"].path == "generate"
    assert manifest.inputs.parents["generate"] == rows.fingerprint and "stage:generate" not in manifest.inputs.data
    assert "stage:generate" in manifest.data["fingerprints"]
    assert manifest.data["data"]["data/rows_in"] == 48
    assert verify_run(made.run_dir) == []
    assert [one.stage for one in lineage(made.run_dir)] == ["generate", "sft2"]
    assert overview(made)["sft2"].state is State.UP_TO_DATE


@pytest.mark.slow
def test_other_rows_make_the_reader_stale_and_equal_rows_do_not(tmp_path):
    recipe = recipe_at(tmp_path)
    for name in ("generate", "sft2"):
        run_section(recipe, name)
    again = recipe_at(tmp_path, "generate.batch_size=7")  # another recipe, the same rows
    run_section(again, "generate")
    assert overview(again)["sft2"].state is State.UP_TO_DATE
    other = recipe_at(tmp_path, "generate.keep=best")
    assert overview(other)["sft2"].reasons == ("parent generate is stale",)
    run_section(other, "generate")
    found = overview(other)["sft2"]
    assert (found.state, found.reasons) == (State.STALE, ("parent generate: retrained",))
    assert [problem.stage for problem in verify_run(other.run_dir)] == ["sft2"]


@pytest.mark.slow
def test_rows_of_another_run_are_read_by_their_directory(made, tmp_path):
    folder = made.run_dir / "generate"
    recipe = recipe_at(tmp_path, f"sft2.data.0.name={folder}")
    assert recipe.order(["sft2"]) == ["sft2"]
    run_section(recipe, "sft2")
    record = manifest_of(recipe, "sft2").parents[f"data:{folder}"]
    assert (record.path, record.name) == (str(folder), "generate")


@pytest.mark.slow
def test_a_directory_without_rows_is_refused_before_anything_runs(tmp_path):
    sft = runs() / "tiny" / "sft"
    recipe = recipe_at(tmp_path, f"sft2.data.0.name={sft}")
    for look in (lambda: check_data(recipe, ["sft2"]), lambda: stage_inputs(recipe, "sft2")):
        with pytest.raises(HandoffError, match=f"{sft} is a language model; .* of sft2 has to name a stage that"):
            look()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sft2.data.0.name=genrate",
            r"sft2.data.0.name: genrate is not a section of this recipe or an existing folder, did",
        ),
        (
            "sft2.data.0.name=some/set",
            "some/set is not a section of this recipe or an existing folder; there are generate",
        ),
        ("sft2.data.0.name=sft2", "sft2.data.0.name: a stage cannot read its own rows"),
        ("sft2.parent=generate", "sft2.parent: generate publishes rows, and sft2 needs a model here"),
        (
            "generate.data=[{source: stage, name: sft2}]",
            "generate reads the rows of sft2, and stage sft publishes none",
        ),
        ("sft2.data.0.path=x", "sft2.data.0.path"),
    ],
)
def test_a_wrong_reference_to_rows_is_an_error_of_the_recipe(tmp_path, override, message):
    path = tmp_path / "best.yaml"
    path.write_text(RECIPE.format(data=tmp_path, root=tmp_path / "runs", sft=tmp_path))
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(path, [override])
    assert "command line" in str(raised.value)


def test_sections_that_read_each_others_rows_wait_for_each_other(tmp_path):
    path = tmp_path / "best.yaml"
    text = RECIPE.format(data=tmp_path, root=tmp_path / "runs", sft=tmp_path)
    path.write_text(
        text + f"  more: {{stage: generate, parent: {tmp_path}, data: [{{source: stage, name: generate}}]}}\n"
    )
    assert load_recipe(path).order() == ["generate", "sft2", "more"]
    with pytest.raises(RecipeError, match="sections wait for each other: generate <- more <- generate"):
        load_recipe(path, ["generate.data=[{source: stage, name: more}]"])
