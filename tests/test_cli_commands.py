"""The baton command: its output and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.recipe import load_recipe

RECIPE = """\
# A test.
name: small
data_root: {folder}
stages:
  tokenizer: {{data: [{{source: world, kind: documents, size: 50}}], vocab_size: 300}}
  pretrain:
    parent: tokenizer
    model: {{architecture: llama}}
    data: [{{source: world, kind: documents}}]
    train: {{learning_rate: 3e-3}}
  dpo: {{parent: pretrain, data: [{{source: world, kind: preferences, families: [facts, "on"]}}]}}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


@pytest.fixture
def baton(tmp_path, root):
    """Runs the command in an empty directory."""

    def baton(*arguments, **options):
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        environment |= options.pop("env", {})
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        command = [sys.executable, "-m", "baton", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, text=True, env=environment, **options)

    return baton


def test_help_names_the_commands_and_the_exit_codes(baton):
    done = baton("--help")
    assert done.returncode == 0
    for word in ("run", "status", "verify", "config", "plan", "report", "chat", "Exit codes"):
        assert word in done.stdout
    assert baton().returncode == 2  # typer's answer to a command that is missing


@pytest.mark.parametrize("command", ["run", "status", "verify", "config", "plan", "report", "chat"])
def test_every_command_refuses_a_missing_recipe(baton, command):
    done = baton(command, "smal.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "smal.yaml: no such recipe" in done.stderr


@pytest.mark.parametrize("command", ["run", "status", "config"])
def test_a_mistake_is_a_message_and_writes_nothing(baton, recipe, tmp_path, command):
    done = baton(command, recipe, "pretrain.train.learning_rat=1")
    assert done.returncode == 2
    assert done.stderr == "command line: pretrain.train.learning_rat: unknown key, did you mean learning_rate?\n"
    assert sorted(tmp_path.iterdir()) == [recipe]


def test_a_key_of_another_stage(baton, recipe):
    done = baton("run", recipe, "dpo.kl_coef=0.1")
    assert done.returncode == 2
    assert done.stderr == "command line: dpo.kl_coef: unknown key. kl_coef is a key of ppo, not of dpo\n"


def test_config_prints_every_value_with_its_source(baton, recipe):
    done = baton("config", recipe, "pretrain.train.max_steps=7")
    assert done.returncode == 0
    lines = {line.partition("  #")[0].strip(): line.partition("  # ")[2] for line in done.stdout.splitlines()}
    assert lines["learning_rate: 0.003"] == f"{recipe}:10"
    assert lines["max_steps: 7"] == "command line"
    assert lines["families: [facts, 'on']"] == f"{recipe}:11"
    assert lines["seed: 42"] == "default"
    resolved = load_recipe(recipe, ["pretrain.train.max_steps=7"]).resolved()
    assert yaml.safe_load(done.stdout) == resolved


def test_config_names_the_models_of_each_section(baton, recipe):
    lines = [line.strip() for line in baton("config", recipe).stdout.splitlines()]
    assert lines[lines.index("pretrain:") + 1] == "# holds policy from tokenizer (trained, random weights, llama)"
    assert lines[lines.index("dpo:") + 1] == "# holds policy from pretrain (trained)"
    assert not lines[lines.index("tokenizer:") + 1].startswith("#")
    assert baton("config", recipe, "--section", "dpo").stdout.startswith("# holds policy from pretrain (trained)\n")


def test_config_of_one_section(baton, recipe):
    done = baton("config", recipe, "--section", "dpo")
    assert yaml.safe_load(done.stdout)["parent"] == "pretrain"
    assert "vocab_size" not in done.stdout
    assert baton("config", recipe, "--section", "dop").stderr == f"{recipe}: no section dop, did you mean dpo?\n"


def test_config_help_status_and_dry_run_need_no_torch(recipe, root, tmp_path):
    code = "import sys; from baton.cli import app; app(sys.argv[1:], standalone_mode=False); "
    code += "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    for arguments in (["config", recipe], ["status", recipe], ["run", recipe, "--dry-run"], ["--help"]):
        program = (
            code
            if arguments[0] != "run"
            else code.replace("; print", "\nexcept SystemExit: print", 1).replace("app(sys", "\ntry: app(sys", 1)
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], cwd=root, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]", arguments


def test_status_before_anything_was_run(baton, recipe):
    done = baton("status", recipe)
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[-3:]] == [
        ["tokenizer", "new"],
        ["pretrain", "new"],
        ["dpo", "new"],
    ]


@pytest.mark.parametrize("command", ["verify", "report", "chat"])
def test_commands_refuse_a_missing_run(baton, recipe, command):
    done = baton(command, recipe)
    assert done.returncode == 2
    assert f"runs/small: nothing has been run yet; make it with `baton run {recipe}`" in done.stderr
    done = baton(command, "runs/smal")
    assert done.returncode == 2
    assert "runs/smal: no such run" in done.stderr


def test_options_of_run_with_unknown_names_are_refused(baton, recipe):
    assert "no section ppo" in baton("run", recipe, "--to", "ppo").stderr
    assert "no section tokeniser, did you mean tokenizer" in baton("run", recipe, "--force", "tokeniser").stderr
    assert "--launch x.yaml: no such file" in baton("run", recipe, "--launch", "x.yaml").stderr


@pytest.mark.slow
def test_a_run_from_nothing_to_a_verified_stage(baton, recipe, tmp_path):
    done = baton("run", recipe, "--to", "tokenizer")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["tokenizer", "new"]
    assert "rows in" in done.stdout  # the stage's own message
    stage = tmp_path / "runs" / "small" / "tokenizer"
    assert (stage / "stage.json").exists()
    assert "rows in" in (stage.parent / "logs" / "tokenizer.log").read_text()

    again = baton("run", recipe, "--to", "tokenizer")
    assert again.stdout.split() == ["tokenizer", "up", "to", "date,", "skipped"]
    assert "up to date" in baton("status", recipe).stdout
    assert baton("verify", recipe).returncode == 0

    (stage / "model" / "tokenizer.json").write_text("{}")
    damaged = baton("verify", stage.parent)
    assert damaged.returncode == 1
    assert "runs/small/tokenizer/model/tokenizer.json: was altered after publishing" in damaged.stderr


def test_a_terminal_of_another_encoding_gets_escapes(baton, recipe, tmp_path):
    other = tmp_path / "données-中文.yaml"
    other.write_text(recipe.read_text())
    done = baton("status", other, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "donn\\xe9es-\\u4e2d\\u6587.yaml" in done.stdout
    wrong = baton("run", other, "dpo.中文=1", env={"PYTHONIOENCODING": "ascii"})
    assert (wrong.returncode, wrong.stderr.split(":")[1]) == (2, " dpo.\\u4e2d\\u6587")


def test_a_file_that_cannot_be_used_is_named(baton, tmp_path):
    done = baton("verify", "x" * 300)
    assert (done.returncode, done.stderr) == (2, f"{'x' * 300}: File name too long\n")
    assert "no stage has been published here" in baton("verify", tmp_path).stderr


def test_a_closed_output_is_no_error(baton, recipe):
    done = baton("config", recipe, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_output_that_cannot_be_written_is_an_error(recipe, root):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "baton", "config", str(recipe)]
        done = subprocess.run(command, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "the output could not be written: No space left on device\n"


def test_no_line_is_broken_inside_a_name(baton, recipe, tmp_path):
    deep = tmp_path / "a folder with a long name" / "and another one with a long name" / "and one more to be sure"
    deep.mkdir(parents=True)
    recipe.rename(deep / "small.yaml")
    small, missing = deep / "small.yaml", deep / "no file"
    done = baton("status", small, f"tokenizer.data=[{{source: file, path: '{missing}'}}]")
    assert str(small) in done.stdout and str(missing) in done.stdout
    assert str(missing) in baton("run", small, f"tokenizer.data=[{{source: file, path: '{missing}'}}]").stderr
    assert str(missing) in baton("verify", small, missing).stderr


def test_control_characters_in_a_recipe_are_shown(baton, recipe):
    recipe.write_text(recipe.read_text().replace("# A test.", 'x-note: "\\e]0;owned\\a"\nx-more: "\\u202E[/bold]"'))
    done = baton("config", recipe, 'dpo.parent="\\e]0;owned\\a[/bold]"')
    assert done.returncode == 2
    assert "\\x1b]0;owned\\x07[/bold] is not a section" in done.stderr and "\x1b" not in done.stderr


@pytest.mark.parametrize("command", ["run", "chat", "replay"])
def test_variables_of_an_earlier_job_are_refused_at_once(baton, recipe, tmp_path, command):
    more = ["--stage", "dpo", "--step", "1"] if command == "replay" else []
    done = baton(command, recipe, *more, env={"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("the environment has WORLD_SIZE=2, RANK=0, as in a process that a launcher started")
    assert sorted(tmp_path.iterdir()) == [recipe]


@pytest.mark.slow
def test_an_error_of_a_stage_is_printed_once(baton, recipe, tmp_path):
    """Both streams in one place: once. Errors alone elsewhere: there, too."""
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"messages"\n')
    arguments = ["run", recipe, "--to", "tokenizer", "tokenizer.data=[{source: file, path: bad.jsonl}]"]
    together = baton(*arguments, stderr=subprocess.STDOUT)
    assert together.returncode == 2
    assert together.stdout.count("bad.jsonl:2: ") == 1, together.stdout
    apart = baton(*arguments)
    assert apart.stdout.count("bad.jsonl:2: ") == apart.stderr.count("  | ") == 1
    assert "bad.jsonl:2: " in apart.stderr


@pytest.mark.slow
def test_a_pipeline_goes_on_when_its_reader_has_gone(baton, recipe, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    sections = ["--to", "tokenizer", "--to", "second"]
    recipe.write_text(
        recipe.read_text() + "  second: {stage: tokenizer, data: [{source: world, kind: chats, size: 50}]}\n"
    )
    done = baton("run", recipe, *sections, "second.vocab_size=300", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    run_dir = tmp_path / "runs" / "small"
    assert (run_dir / "tokenizer" / "stage.json").exists() and (run_dir / "second" / "stage.json").exists()
    assert "rows in" in (run_dir / "logs" / "second.log").read_text()


def test_plan_prints_text_or_one_object_and_names_an_unknown_gpu(baton, recipe):
    done = baton("plan", recipe, "--gpu", "h100", "pretrain.model.num_hidden_layers=2")
    assert done.returncode == 0, done.stderr
    assert "on h100: single, 1 process" in done.stdout and "pretrain" in done.stdout and "fits" in done.stdout
    done = baton("plan", recipe, "--json", "pretrain.model.num_hidden_layers=2")
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout)["sections"]
    assert list(sections) == ["pretrain", "dpo"] and sections["dpo"]["models"][0]["parameters"] > 1e8
    done = baton("plan", recipe, "--gpu", "h1oo")
    assert done.returncode == 2 and "--gpu h1oo: there are h200" in done.stderr
