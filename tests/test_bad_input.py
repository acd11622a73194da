"""User mistakes at the command line: a message with the place and the fix, exit code 2, and nothing written.

Commands run in this process, by the entry point that the shell calls. Two run in a real shell, since a launcher or the
warm server starts their stage. The rules behind the messages have separate tests.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

import baton.cli
import training.run
from handoff import files
from handoff.lock import RunLock
from tests.bad_data import CHAT, DATA, PAIR
from tests.handoff_models import write_model
from training.recipe import load_recipe

RECIPE = """\
name: bad
data_root: FOLDER
output_root: FOLDER/runs
stages:
  sft:
    parent: RUN/pretrain
    data: [{source: file, path: chats.jsonl}]
    max_length: 64
    train: {max_steps: 2, global_batch_size: 8}
  reward:
    stage: reward_model
    parent: RUN/sft
    data: [{source: file, path: pairs.jsonl}]
    max_length: 64
    train: {max_steps: 2, global_batch_size: 8}
  ppo:
    parent: RUN/sft
    reward: [{model: RUN/reward}]
    data: [{source: file, path: chats.jsonl}]
    train: {iterations: 1, rollout_batch_size: 8, max_completion_length: 4}
"""

Command = Callable[..., str]


@pytest.fixture
def refused(monkeypatch, capsys) -> Command:
    """Runs `baton ...` or `python -m stages.<stage> ...`, and returns the message with which it exits with 2."""

    def refused(program: str, *arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            if program == "baton":
                monkeypatch.setattr(sys, "argv", ["baton", *words])
                baton.cli.main()
            else:
                training.run.main(program.removeprefix("stages."), words)
        message = capsys.readouterr().err
        assert exited.value.code == 2, message
        assert "Traceback" not in message
        return message

    return refused


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe with good data, whose parents are only files that look like models."""
    for name in ("pretrain", "sft", "reward"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        write_model(tmp_path / "elsewhere" / name)
    return write_recipe(tmp_path, tmp_path / "elsewhere")


@pytest.fixture
def trained(tmp_path, micro_recipe) -> Path:
    """The same recipe, with the micro recipe's stages as parents."""
    return write_recipe(tmp_path, load_recipe(micro_recipe).run_dir)


def write_recipe(folder: Path, run: Path) -> Path:
    path = folder / "bad.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(folder)).replace("RUN", str(run)))
    (folder / "chats.jsonl").write_text(f"{json.dumps(CHAT)}\n" * 8)
    (folder / "pairs.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 8)
    return path


def everything(folder: Path) -> dict[str, str]:
    """A folder's content: relative path -> hash, or a mark for a folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        for path in folder.rglob("*")
    }


# ---- the recipe

MISTAKES = """\
nmae: x
name: bad
stages:
  tokenizer:
    vocab_sise: 300
    data: [{source: world, kind: documents, sise: 3}]
  pretrain:
    parent: tokenizer
    model: {architecture: llama}
    data: [{source: world, kind: document}]
    train: {learning_rat: 0.1, max_steps: many}
    model_args: {attention: sdpa}
  ppo:
    parent: pretrain
    reward: [{modle: reward}]
    data: [{source: world, kind: prompts}]
    packing: true
"""
SAID = """\
bad.yaml:1: nmae: unknown key, did you mean name?
bad.yaml:5: tokenizer.vocab_sise: unknown key, did you mean vocab_size?
bad.yaml:6: tokenizer.data.0.sise: unknown key, did you mean size?
bad.yaml:10: pretrain.data.0.kind:
bad.yaml:11: pretrain.train.learning_rat: unknown key, did you mean learning_rate?
bad.yaml:11: pretrain.train.max_steps:
bad.yaml:12: pretrain.model_args.attention: unknown key,
bad.yaml:15: ppo.reward.0.modle: unknown key, did you mean model?
bad.yaml:17: ppo.packing: unknown key. packing is a key of sft, not of ppo
"""
COMMANDS = [("baton", "run"), ("baton", "status"), ("baton", "config"), ("stages.ppo",), ("stages.pretrain",)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_unread_keys_are_named_at_every_level(command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(MISTAKES)
    lines = refused(*command, "bad.yaml").splitlines()
    assert len(lines) == len(SAID.splitlines()), lines
    for line, beginning in zip(lines, SAID.splitlines(), strict=True):
        assert line.startswith(beginning)
    assert list(everything(tmp_path)) == ["bad.yaml"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.learning_rat=1", "command line: sft.train.learning_rat: unknown key, did you mean learning_rate?"),
        ("sft.trian.learning_rate=1", "command line: sft.trian: unknown key, did you mean train?"),
        ("train.learning_rate=fast", "command line: sft.train.learning_rate: "),
        ("train.global_batch_size=0", "command line: sft.train.global_batch_size: "),
        ("parent=", "command line: sft.parent: expected text, not nothing"),
    ],
)
def test_unread_keys_on_a_stages_command_line_are_named(key, message, refused, recipe, tmp_path):
    before = everything(tmp_path)
    assert message in refused("stages.sft", recipe, key)
    assert everything(tmp_path) == before


# ---- parents


def test_an_unmade_parent_names_the_command_that_makes_it(refused, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"name: r\noutput_root: {tmp_path}/runs\nstages:\n"
        "  tokenizer: {data: [{source: world, kind: documents}]}\n"
        "  pretrain: {parent: tokenizer, data: [{source: world, kind: documents}]}\n"
    )
    message = refused("stages.pretrain", path)
    assert (
        message == f"{tmp_path}/runs/r/tokenizer: not published yet; make it with `baton run {path} --to tokenizer`\n"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("command", [("baton", "run"), ("stages.sft",)], ids=" ".join)
def test_a_missing_parent_is_refused(command, refused, recipe, tmp_path):
    before = everything(tmp_path)
    message = refused(*command, recipe, f"sft.parent={tmp_path}/elsewhere/sftt")
    assert message == (
        f"command line: sft.parent: {tmp_path}/elsewhere/sftt is not a section of this recipe, an existing folder or "
        ".gguf file, or a hub id (organisation/name); there are sft, reward, ppo\n"
    )
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rows": 8}, "the tokenizer has 11 ids but the model only 8 embeddings; use the tokenizer that the model was"),
    ],
    ids=["tokenizer larger than the model"],
)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_an_untrainable_foreign_checkpoint_is_refused(stage, model, message, refused, recipe, tmp_path):
    write_model(tmp_path / "llama", **model)
    before = everything(tmp_path)
    said = refused(f"stages.{stage}", recipe, f"parent={tmp_path / 'llama'}")
    assert said.startswith(f"command line: {stage}.parent: {tmp_path / 'llama'}: {message}")
    assert "resize" in said  # the fix that the message gives
    assert everything(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "key", "place", "message"),
    [
        (
            "sft",
            "parent=RUN/tokenizer",
            "sft.parent",
            "RUN/tokenizer is a tokenizer, and a language model is needed here",
        ),
        ("sft", "parent=RUN/reward", "sft.parent", "RUN/reward is a reward model, and a language model is needed here"),
        ("ppo", "parent=RUN/reward", "ppo.parent", "RUN/reward is a reward model, and a language model is needed here"),
        (
            "ppo",
            "ppo.reward=[{model: RUN/sft}]",
            "ppo.reward.0.model",
            "RUN/sft is a language model, and a reward model is needed here",
        ),
    ],
)
def test_a_parent_of_the_wrong_kind_is_refused(stage, key, place, message, refused, trained, tmp_path):
    run = load_recipe(trained).sections["reward"].parents["parent"].removesuffix("/sft")
    before = everything(tmp_path)
    said = refused(f"stages.{stage}", trained, key.replace("RUN", run))
    assert said == f"command line: {place}: {message.replace('RUN', run)}\n"
    assert everything(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_parent_altered_after_publishing_is_refused(name, refused, trained, tmp_path, micro_recipe):
    """Also covers another tokenizer or template put into a published model."""
    shutil.copytree(load_recipe(micro_recipe).run_dir / "pretrain", tmp_path / "pretrain")
    touched = tmp_path / "pretrain" / "model" / name
    touched.write_bytes(touched.read_bytes() + b" ")
    before = everything(tmp_path)
    message = refused("stages.sft", trained, f"parent={tmp_path / 'pretrain'}")
    assert message == (
        f"{tmp_path}/pretrain was altered after publishing: model/{name} was altered; restore it, or make it with "
        "`baton run <recipe> --to pretrain`\n"
    )
    assert everything(tmp_path) == before


def other_encoding(folder: Path, sft: Path, what: str) -> None:
    """A foreign policy: `sft` with another template, or with one word fewer in its tokenizer."""
    shutil.copytree(sft / "model", folder)
    if what == "template":
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + "{# of another make #}")
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_a_reward_model_with_another_encoding_is_refused(what, refused, trained, tmp_path, micro_recipe):
    run = load_recipe(micro_recipe).run_dir
    other_encoding(tmp_path / "policy", run / "sft", what)
    before = everything(tmp_path)
    difference = {"tokenizer": "have different tokenizers", "template": "differ in their chat templates"}[what]

    message = refused("stages.ppo", trained, f"parent={tmp_path / 'policy'}")
    assert message.startswith(f"policy ({tmp_path}/policy) and reward ({run}/reward) ")
    assert difference in message
    assert message.endswith(": the reward model reads the policy's tokens; set `reencode: true`\n")

    # `reencode` solves it for the reward, but not for a critic that starts from the reward model.
    again = refused(
        "stages.ppo", trained, f"parent={tmp_path / 'policy'}", f"ppo.reward=[{{model: {run}/reward, reencode: true}}]"
    )
    assert difference in again
    assert again.endswith(": the critic reads the policy's tokens; name another one under `critic`\n")
    assert everything(tmp_path) == before


# ---- data


def test_a_missing_file_stops_a_run_before_its_first_stage(refused, recipe, tmp_path):
    (tmp_path / "pairs.jsonl").unlink()
    before = everything(tmp_path)
    message = refused("baton", "run", recipe)
    assert message.startswith(f"`path: pairs.jsonl` under data_root {tmp_path}: no such file")
    assert "Correct the path or data_root" in message
    message = refused("baton", "run", recipe, f"data_root={tmp_path}/nowhere")
    assert message.startswith(f"command line: data_root: there is no folder {tmp_path}/nowhere")
    assert everything(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", DATA)
def test_untrainable_data_is_refused(what, refused, trained, tmp_path):
    stage, name, content, message = DATA[what]
    (tmp_path / name).write_bytes(content)
    before = everything(tmp_path)
    said = refused(f"stages.{stage}", trained, f"data=[{{source: file, path: {name}}}]")
    assert said.startswith(message)
    assert everything(tmp_path) == before


@pytest.mark.slow
def test_a_refused_start_keeps_the_published_stage(refused, tmp_path, micro_recipe):
    """Neither the published model nor its previous generation is lost, whichever part of the start fails."""
    shutil.copytree(micro_recipe.parent, tmp_path / "micro")
    path = tmp_path / "micro" / "micro.yaml"
    path.write_text(path.read_text().replace(str(micro_recipe.parent), str(path.parent)))
    (tmp_path / "micro" / "empty.jsonl").touch()
    before = everything(tmp_path)
    assert (path.parent / "runs" / "micro" / "sft" / "stage.json").exists()
    root = f"data_root={tmp_path / 'micro'}"
    assert "is empty" in refused("stages.sft", path, root, "sft.data=[{source: file, path: empty.jsonl}]")
    assert "needs a CUDA GPU" in refused("stages.sft", path, "sft.model_args.attn_implementation=flash_attention_2")
    assert "publishes a tokenizer" in refused("stages.sft", path, "sft.parent=tokenizer")
    assert everything(tmp_path) == before


# ---- batches, the disk, other runs, the machine


@pytest.mark.slow
def test_a_rollout_that_minibatches_do_not_divide_is_refused(refused, trained, tmp_path):
    before = everything(tmp_path)
    said = refused("stages.ppo", trained, "train.rollout_batch_size=6", "train.num_mini_batches=4")
    assert said == f"{tmp_path}/bad.yaml:20: ppo.train: rollout_batch_size 6 is not a multiple of num_mini_batches 4\n"
    assert everything(tmp_path) == before


def test_too_little_disk_space_is_refused(refused, recipe, tmp_path, monkeypatch):
    write_model(tmp_path / "llama")
    before = everything(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(1 << 30, (1 << 30) - 4096, 4096))
    message = refused("stages.sft", recipe, f"parent={tmp_path / 'llama'}")
    assert message == (
        f"{tmp_path}/runs/bad/sft: stage sft needs 64.0 MiB, but {tmp_path} has 4.0 KiB free; free some space or set "
        "an output_root on another disk\n"
    )
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", [("baton", "run", "--to", "sft"), ("stages.sft",)], ids=" ".join)
def test_an_unwritable_output_directory_is_refused(command, refused, recipe, tmp_path, monkeypatch):
    write_model(tmp_path / "llama")
    parent = f"sft.parent={tmp_path / 'llama'}"
    (tmp_path / "taken").touch()
    before = everything(tmp_path)
    message = refused(*command, recipe, parent, f"output_root={tmp_path}/taken")
    assert f"{tmp_path}/taken is a file, not a directory; move it away or set another output_root" in message
    # Tests may run as root, which may write everywhere, so the system's refusal is simulated.
    monkeypatch.setattr(files.os, "access", lambda path, mode: not mode & os.W_OK)
    message = refused(*command, recipe, parent)
    assert f"no permission to write in {tmp_path}; allow it or set another output_root" in message
    assert everything(tmp_path) == before


def test_a_second_run_in_the_same_directory_is_refused(refused, recipe, tmp_path):
    write_model(tmp_path / "llama")
    run = tmp_path / "runs" / "bad"
    owner = f"is in use by process {os.getpid()} on "
    advice = "; wait for it, stop it, or use another output_root or name\n"
    for directory, command in ((run, ("baton", "run", "--to", "sft")), (run / "sft", ("stages.sft",))):
        with RunLock(directory, "the first"):
            before = everything(tmp_path)
            message = refused(*command, recipe, f"sft.parent={tmp_path / 'llama'}")
            assert message.startswith(f"{directory} {owner}") and message.endswith(advice)
            assert everything(tmp_path) == before


def shell(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("baton")), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_stage_that_is_refused_in_a_run(root, trained, tmp_path):
    """The runner passes on the stage's message and exit code, and leaves only its log."""
    (tmp_path / "x.jsonl").write_bytes(DATA["broken JSON"][2])
    before = everything(tmp_path)
    done = shell(root, "run", trained, "--to", "sft", "sft.data=[{source: file, path: x.jsonl}]")
    assert done.returncode == 2
    assert "sft failed with exit code 2" in done.stderr
    assert "  | DataError: x.jsonl:3: broken JSON at column " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    new = everything(tmp_path).keys() - before.keys()
    assert {name for name in new if (tmp_path / name).is_file()} == {"runs/bad/.lock", "runs/bad/logs/sft.log"}


@pytest.mark.slow
def test_a_gpu_launch_file_without_a_gpu_is_refused(root, trained, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = yaml.safe_load((root / "recipes" / "launch" / "ddp.yaml").read_text())
    launch = tmp_path / "two.yaml"
    launch.write_text(yaml.safe_dump({**settings, "num_processes": 2}))  # eight processes take long to start
    before = everything(tmp_path)
    done = shell(root, "run", trained, "--to", "sft", "--launch", launch)
    assert done.returncode == 2, done.stderr
    assert "LaunchError: the launch file asks for 2 GPUs on this machine" in done.stderr
    assert "use recipes/launch/cpu2.yaml" in done.stderr
    assert "Traceback" not in done.stderr
    new = everything(tmp_path).keys() - before.keys()
    assert {name for name in new if (tmp_path / name).is_file()} == {"runs/bad/.lock", "runs/bad/logs/sft.log"}
