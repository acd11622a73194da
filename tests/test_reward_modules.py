"""Reward functions of the user's own: found in the working directory, and checked before any stage starts."""

import os
import subprocess
import sys

import pytest

from reward.check import Use, check_functions
from reward.functions import RewardError, find

RECIPE = """\
name: own
stages:
  tokenizer: {{data: [{{source: world, kind: documents, size: 50}}], vocab_size: 300}}
  pretrain:
    {{parent: tokenizer, model: {{architecture: llama}}, data: [{{source: world, kind: documents}}]}}
  generate:
    parent: pretrain
    data: [{{source: world, kind: prompts}}]
    scores:
      - {{function: length_penalty}}
      - {{function: "{function}"}}
"""
MODULES = {
    "raises.py": ("import json\n\nraise RuntimeError('no licence here')\n", "RuntimeError: no licence here", 3),
    "unclosed.py": ("def f(:\n", "SyntaxError: invalid syntax", 1),
    "needs.py": ("import os\nimport a_package_that_nobody_has\n", "No module named 'a_package_that_nobody_has'", 2),
    "leaves.py": ("import sys\nsys.exit('bye')\n", "SystemExit: bye", 2),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(vars(module).get("__file__"))]:
        del sys.modules[name]


def check(*functions: str, **args) -> str:
    with pytest.raises(RewardError) as caught:
        check_functions([Use(f"r.yaml:{n}", "x", function, args) for n, function in enumerate(functions)])
    return str(caught.value)


def test_a_module_in_the_working_directory_is_found(here):
    (here / "my_rewards.py").write_text(
        "def size(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    assert find("x", "my_rewards:size", {}).function([], ["a"]) == [1.0]
    check_functions([Use("r.yaml:1", "x", "my_rewards:size", {})])
    assert check("my_rewards:siez") == (
        "r.yaml:0: reward function `my_rewards:siez` cannot be imported: my_rewards has no `siez`, "
        "did you mean `my_rewards:size`?"
    )


@pytest.mark.parametrize("name", MODULES)
def test_an_error_in_a_module_names_its_file_and_line(here, name):
    text, reason, line = MODULES[name]
    (here / name).write_text(text)
    with pytest.raises(RewardError) as caught:
        find("x", f"{name.removesuffix('.py')}:f", {})
    assert reason in str(caught.value)
    assert f"({here / name}:{line})" in str(caught.value)


def test_every_mistake_is_reported_and_a_module_may_end_its_process_but_not_ours(here):
    (here / "ends.py").write_text("import os\nprint('noise')\nos._exit(7)\n")
    assert check("nothing_known", "no_such:f", "ends:f").splitlines() == [
        check("nothing_known"),
        f"r.yaml:1: reward function `no_such:f` cannot be imported: ModuleNotFoundError: No module named 'no_such'; it "
        f"is looked for in {here} and among the installed packages",
        "r.yaml:2: importing `ends:f` ended the process (exit code 7); a module of reward functions must not end it "
        "when it is imported",
    ]
    assert "no argument `fre`; did you mean `free`?" in check("length_penalty", fre=3)


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("def f(completions, **columns): ...", "it takes 1 of these two arguments by position"),
        ("def f(completions, prompts): ...", "its first arguments are completions and prompts"),
        ("async def f(prompts, completions): ...", "without `async`"),
        ("f = 3", "is not callable"),
    ],
)
def test_a_function_of_another_form_is_refused(here, definition, reason):
    (here / "other_form.py").write_text(definition)
    assert reason in check("other_form:f")


@pytest.mark.parametrize("start", ["", "sys.path = [path for path in sys.path if path]; "], ids=["module", "script"])
def test_baton_run_refuses_before_anything_is_written(here, root, start):
    """Also started as the console script, whose module path lacks the working directory."""
    (here / "broken.py").write_text("x = 1\nraise ValueError('not here')\n")
    (here / "r.yaml").write_text(RECIPE.format(function="broken:f"))
    program = f"import sys; {start}from baton.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program, "run", "r.yaml"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "r.yaml:11: generate.scores.1.function: reward function `broken:f` cannot be imported: ValueError: not here "
        f"({here / 'broken.py'}:2)\n"
    )
    assert not (here / "runs").exists()
