"""Chat without a model: where answers and errors are printed, and names of sections that do not exist."""

import re

import pytest

from baton.chat import Terminal, converse
from baton.targets import open_models
from data.errors import DataError
from handoff.errors import UserError


class Echo:
    """A speaker that repeats each line and refuses long ones."""

    name = "echo"

    def reset(self, system):
        """Has no conversation to forget."""

    def answer(self, text):
        """Yields the line."""
        if len(text) > 10:
            raise DataError(f"{len(text)} characters are too many")
        yield text


@pytest.mark.parametrize("speakers", [1, 2])
def test_a_script_reads_answers_alone_and_errors_go_to_standard_error(speakers, capsys):
    terminal = Terminal(asks=False)
    lines = iter(["one", "x" * 11, "caf\udce9", "/nothing", "two"])
    terminal.read = lambda: next(lines, None)  # type: ignore[method-assign]
    converse(terminal, [Echo()] * speakers)  # type: ignore[list-item]
    said = capsys.readouterr()
    before = "" if speakers == 1 else "echo: "
    assert said.out == "".join(f"{before}{answer}\n" * speakers for answer in ("one", "two"))
    assert [line.partition(" ")[0] for line in said.err.splitlines()] == ["11", "a", "no"]


def test_a_section_that_does_not_exist_is_refused_with_those_that_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nstages:\n  words: {stage: tokenizer, data: [{source: world, kind: documents}]}\n"
        "  tuned: {stage: sft, parent: org/model, data: [{source: world, kind: chats}]}\n"
    )
    run_dir = tmp_path / "runs" / "r"
    (run_dir / "words").mkdir(parents=True)
    (run_dir / "words" / "started.json").write_text("{}")
    for target, name, told in (
        (recipe, "nope", f"{recipe}: no section nope; there are words, tuned"),
        (recipe, "tned", f"{recipe}: no section tned, did you mean tuned?"),
        (run_dir, "nope", f"{run_dir}: no section nope; there are words"),
        (run_dir, "word", f"{run_dir}: no section word, did you mean words?"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
            open_models(target, [name])
    with pytest.raises(UserError, match="make it with `baton run <recipe> --to tuned`"):
        open_models(recipe, ["tuned"])


def test_ctrl_c_drops_a_line_in_a_terminal_and_ends_a_script(monkeypatch, capsys):
    def typed(*keys):
        rest = iter(keys)

        def line(*_):
            key = next(rest)
            if key is KeyboardInterrupt:
                raise key
            return key

        return line

    terminal = Terminal(asks=True)
    monkeypatch.setattr(terminal.console, "input", typed(KeyboardInterrupt, " one ", KeyboardInterrupt, "two"))
    assert (terminal.read(), terminal.read()) == ("one", "two")
    assert "Ctrl-C once more" in capsys.readouterr().out
    monkeypatch.setattr(terminal.console, "input", typed(KeyboardInterrupt, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        terminal.read()
    script = Terminal(asks=False)
    monkeypatch.setattr("builtins.input", typed(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.read()
