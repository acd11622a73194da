"""Random recipes, command lines and chat input: a command does what it is asked, or names the mistake and exits with 2.

Whatever the input: no traceback, no control character on the terminal, nothing written. tests/fuzzing.py says how to
run it for an hour.
"""

import copy
import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from baton.chat import Terminal, converse
from baton.cli import main
from baton.speaker import ChatSampling, Speaker
from baton.targets import open_models
from tests.fuzzing import STRANGE, examples, fuzz, tree, values
from training.recipe import load_recipe
from training.terminal import Screen

RECIPE = """\
name: small
seed: 1
output_root: runs
x-notes: {mine: 1}
stages:
  tokenizer: {data: [{source: world, kind: documents, size: 50}], vocab_size: 300}
  pretrain:
    parent: tokenizer
    model: {architecture: llama, hidden_size: 64}
    data: [{source: world, kind: documents}, {source: file, path: a.txt, format: text, holdout: 0.1, split: train}]
    train: {learning_rate: 3e-3, max_steps: 3}
  sft: {parent: pretrain, data: [{source: world, kind: chats}], max_length: 64}
  reward: {stage: reward_model, parent: sft, data: [{source: world, kind: preferences}]}
  dpo: {parent: sft, data: [{source: world, kind: preferences, families: [facts, "on"]}]}
  ppo:
    parent: sft
    reward: [{model: reward}, {function: length_penalty, weight: 0.5, args: {free: 8}}]
    data: [{source: world, kind: prompts}]
    train: {iterations: 2}
  evaluate: {models: [sft, ppo], tasks: [{name: world, data: [{source: world, kind: prompts}]}]}
"""
COMMANDS = ["run", "status", "verify", "replay", "config", "report", "chat"]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def command(*arguments: str) -> tuple[object, str, str]:
    """(exit code, output, errors) of a `baton` command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["baton", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return end.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before


def check(folder: Path, *arguments: str) -> object:
    """Runs a command; checks its output and that it wrote nothing. Returns its exit code."""
    before = tree(folder)
    code, out, err = command(*arguments)
    assert code in (0, 2), (code, err)
    assert code == 0 or err.strip(), (code, out)
    assert "Traceback" not in err + out
    assert not CONTROL.search(out + err), (out, err)
    assert tree(folder) == before
    return code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "a.txt").write_text("A short text.\n" * 20)
    assert check(tmp_path, "run", "r.yaml", "--dry-run") == 0
    return tmp_path


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all keys and entries."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in entries for found in [(*path, key), *places(inner, (*path, key))]]


PLACES = places(yaml.safe_load(RECIPE))


def changed(changes: list[tuple[tuple, str, object]]) -> str:
    """The recipe with values replaced, removed, added or wrapped, as YAML."""
    recipe = copy.deepcopy(yaml.safe_load(RECIPE))
    for path, how, value in changes:
        holder = recipe
        try:
            for part in path[:-1]:
                holder = holder[part]
            old = holder[path[-1]]
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
        if isinstance(holder, str):  # an earlier change put a text there
            continue
        if how == "remove":
            del holder[path[-1]]
        elif how == "add" and isinstance(old, dict):
            old[str(value)] = value
        else:
            holder[path[-1]] = [old] if how == "wrap" else value
    return yaml.safe_dump(recipe, allow_unicode=True)


changes = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["replace", "remove", "add", "wrap"]), values),
    min_size=1,
    max_size=3,
)
texts = st.text(max_size=200) | st.builds(
    lambda at, length, new: RECIPE[:at] + new + RECIPE[at + length :],
    st.integers(0, len(RECIPE)),
    st.integers(0, 30),
    st.text(alphabet="{}[]:,-#&*!|>'\"%@`~ \t\n\x00\x1b\u202e\ufeffa1é", max_size=12),
)


@examples(fast=10, full=250)
def test_a_changed_recipe_is_used_or_refused(folder, count):
    def used_or_refused(change: list, words: str) -> None:
        (folder / "r.yaml").write_text(changed(change), encoding="utf-8", errors="surrogatepass")
        check(folder, *words.split())

    fuzz(count, used_or_refused, changes, st.sampled_from(["run r.yaml --dry-run", "config r.yaml", "status r.yaml"]))


@examples(fast=20, full=400)
def test_a_text_that_is_no_recipe_is_refused(folder, count):
    def refused(text: str, encoding: str) -> None:
        (folder / "r.yaml").write_bytes(text.encode(encoding, errors="surrogatepass"))
        check(folder, "run", "r.yaml", "--dry-run")

    fuzz(count, refused, texts, st.sampled_from(["utf-8", "utf-8", "utf-16"]))


@pytest.mark.parametrize("depth", [50, 2_000])
@pytest.mark.parametrize("form", ["a: [{}1{}]", "- {}1{}", "x: {}{}"])
def test_deep_nesting_is_refused(folder, depth, form):
    (folder / "r.yaml").write_text(form.format("[" * depth, "]" * depth))
    assert check(folder, "config", "r.yaml") == 2


overrides = st.builds(
    lambda path, value: f"{'.'.join(map(str, path))}={value}",
    st.sampled_from([path[1:] if path[0] == "stages" else path for path in PLACES if path != ("stages",)]),
    st.sampled_from([str(value) for value in STRANGE]) | st.text(max_size=20),
)
OPTIONS = "--to --force --launch --section --stage --step --output --model --compare --system --temperature --seed --"
WORDS = f"r.yaml runs runs/small . {OPTIONS} --max-new-tokens --help sft ppo 1 -1 nan sft.data.0.size=3"
words = st.sampled_from([*COMMANDS, *WORDS.split(), "9" * 40])
arguments = st.lists(words | overrides | st.text(max_size=12) | st.sampled_from([str(v) for v in STRANGE]), max_size=5)


@examples(fast=20, full=400)
def test_a_command_line_is_obeyed_or_refused(folder, count):
    def obeyed_or_refused(name: str, rest: list[str]) -> None:
        given = [word.replace("\0", "") for word in rest]  # no argument of a program can hold a null
        check(folder, name, *(["r.yaml", "--dry-run"] if name == "run" else []), *given)

    fuzz(count, obeyed_or_refused, st.sampled_from(COMMANDS), arguments)


lines = st.text(max_size=40) | st.sampled_from(
    ["/reset", "/system", "/system \x1b", "/", "/quit", "<|end|>", "<|bos|>", "[/bold]", " ", "\ud800", "x " * 600]
)


@pytest.mark.slow  # it trains a small model, once for all tests
@examples(fast=10, full=150)
def test_chat_answers_or_refuses_each_line(micro_recipe, count):
    (parent,) = open_models(load_recipe(micro_recipe).run_dir, ["sft"])
    speaker = Speaker(parent, ChatSampling(1.0, 2, 0))
    out = io.StringIO()

    def answers(said: list[str], system: str | None) -> None:
        terminal = Terminal(Screen(file=out), Screen(file=out), asks=False)
        rest = iter(said)
        terminal.read = lambda: next(rest, None)  # type: ignore[method-assign]
        speaker.reset(system)
        converse(terminal, [speaker])
        assert not CONTROL.search(out.getvalue())
        out.seek(0)
        out.truncate()

    fuzz(count, answers, st.lists(lines, max_size=3), st.none() | st.text(max_size=10))
