"""The documentation: its commands run, its recipes load, what it names is there, and its figures' tables have all keys.

`tests/docs_pages.py` says how a page marks its blocks, `tests/docs_work.py` where the commands run.
"""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests import docs_keys, docs_pages, docs_work

ROOT = Path(__file__).resolve().parent.parent
BOOK = docs_pages.read_book(ROOT)
NAMES = [page.name for page in BOOK.pages]
SECONDS = 600
"""After which a block hangs. On a quiet machine all of them together take a tenth of it."""


@pytest.mark.parametrize("page", BOOK.pages, ids=NAMES)
def test_what_a_page_says_is_there(page):
    assert docs_pages.problems(BOOK, page) == []


def test_every_page_is_in_the_index_and_leads_on_to_another(root):
    assert docs_pages.pages_on_disk(root) == set(NAMES) - {"README.md"}
    silent = [p.name for p in BOOK.pages if p.name != "README.md" and not re.search(r"^Next: .*\]\(", p.prose, re.M)]
    assert silent == []


def test_every_page_that_any_file_names_exists(root):
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    missing = []
    for name in filter(None, tracked.stdout.split("\0")):
        path = root / name
        if not path.is_file() or name == "tests/test_docs.py":
            continue
        for page in re.findall(r"(?<![\w/.])docs/[\w./-]+\.md", path.read_text(encoding="utf-8")):
            if not (root / page).is_file():
                missing.append(f"{name}: {page}")
    assert missing == []


def test_the_page_of_keys_is_what_the_classes_say(root):
    """`python tests/docs_keys.py` writes it again."""
    assert (root / "docs" / "keys.md").read_text(encoding="utf-8") == docs_keys.page()


@pytest.mark.slow
def test_the_commands_run_in_the_order_of_the_pages(root, tmp_path):
    docs_work.make_folder(root, tmp_path)
    for path, text in BOOK.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    ran = [block for page in BOOK.pages for block in page.blocks if (block.language, block.marker) == ("sh", "run")]
    assert len(ran) > 20
    for block in ran:
        done = docs_work.run(block.text, tmp_path, root, SECONDS)
        assert done.returncode == 0, f"{block.where}: {block.text}\n{done.stdout}"

    # What those runs logged is explained on the page of metrics.
    metrics = docs_pages.read_page(root, "docs/metrics.md").prose
    explained = {name for row in metrics.splitlines() if row[:2] == "| " for name in re.findall(r"`([^`]+)`", row)}
    patterns = [re.escape(name).replace("<reward>", ".+").replace("<what>", r"\w+") for name in explained]
    unexplained = {
        (path.parent.name, name)
        for path in tmp_path.glob("runs/*/*/metrics.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
        for name in json.loads(line)
        if not any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    assert unexplained == set()


# ---- mistakes are found

MISTAKES = {
    "an unmarked block": ("```sh\nbaton status recipes/tiny.yaml\n```", "say what a test does with it"),
    "a block that is not run for no reason": ("```sh not run:\nls\n```", "say what a test does with it"),
    "an indented block": ("Type\n\n    make rlhf\n", "an indented block"),
    "a block without an end": ("```sh run\nmake rlhf\n", "does not end"),
    "a sub-command": ("```sh run\nbaton rnu recipes/tiny.yaml\n```", "no command rnu"),
    "an option": ("```sh run\nbaton run recipes/tiny.yaml --too ppo\n```", "No such option"),
    "a missing option": ("```sh run\nbaton replay runs/tiny --stage ppo\n```", "Missing option"),
    "a section": ("```sh run\nbaton run recipes/tiny.yaml --to pppo\n```", "no section pppo"),
    "an override": ("```sh run\nbaton run recipes/tiny.yaml ppo.train.kl_cof=1\n```", "did you mean kl_coef"),
    "a recipe": ("```sh run\nbaton run recipes/tny.yaml\n```", "no recipe recipes/tny.yaml"),
    "a launch file": (
        "```sh run\nbaton run recipes/tiny.yaml --launch recipes/launch/x.yaml\n```",
        "no file recipes/l",
    ),
    "a second command of a line": ("```sh run\nls && baton rnu\n```", "no command rnu"),
    "a continued line": ("```sh run\nbaton run \\\n  recipes/tny.yaml\n```", "no recipe"),
    "a target": ("```sh run\nmake rhlf\n```", "no target rhlf"),
    "an override through make": ('```sh run\nmake sft SET="sft.train.max_step=1"\n```', "did you mean max_steps"),
    "a module": ("```sh run\npython -m stages.sfd recipes/tiny.yaml\n```", "no module stages.sfd"),
    "an override of a module": (
        "```sh not run: two processes\naccelerate launch --config_file recipes/launch/cpu2.yaml -m stages.sft "
        "recipes/tiny.yaml train.max_step=1\n```",
        "did you mean max_steps",
    ),
    "a program": ("```sh run\nbatn run\n```", "no program batn"),
    "a command in a sentence": ("Type `baton rnu recipes/tiny.yaml`.", "no command rnu"),
    "an option in a sentence": ("Type `baton run --lunch FILE`.", "no option --lunch"),
    "a target in a sentence": ("Type `make rhlf`.", "no target rhlf"),
    "a key of a recipe": ("```yaml recipe\nname: x\nstages:\n  tokenizer: {dat: []}\n```", "did you mean data"),
    "a key of a section": ("```yaml keys\nppo: {train: {kl_cof: 1.0}}\n```", "did you mean kl_coef"),
    "a section to lay over": ("```yaml keys\npppo: {train: {kl_coef: 1.0}}\n```", "no section pppo"),
    "a parent": (
        "```yaml sections\nx: {stage: sft, parent: sftt, data: [{source: world, kind: chats}]}\n```",
        "sftt is not a section",
    ),
    "an entry of data": ("```yaml data\n- {source: file, pth: x}\n```", "path"),
    "an argument of a reward": ("```yaml reward\n- {function: math_equal, args: {tolrance: 1}}\n```", "tolrance"),
    "an argument of a reward in a section": (
        "```yaml keys\nppo: {reward: [{function: xml_format, args: {tag: [a]}}]}\n```",
        "tag",
    ),
    "yaml": ("```yaml data\n- {source: file\n```", "not valid YAML"),
    "a path": ("See `training/recpe.py`.", "there is no training/recpe.py"),
    "a path in a block": ("```text\nstages/sfd/train.py\n```", "there is no stages/sfd/train.py"),
    "a path that is no longer planned": ("<!-- planned: training/recipe.py -->", "is marked as planned and exists"),
    "a link": ("[here](real_text.md)", "there is no docs/real_text.md"),
    "an anchor": ("[here](rl.md#guard)", "no heading of that name"),
    "an anchor of the page itself": ("# Title\n\n[here](#titel)", "no heading of that name"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_on_a_page_is_found(text, message):
    found = docs_pages.problems(BOOK, docs_pages.parse("docs/page.md", f"{text}\n"))
    assert any(message in problem and problem.startswith("docs/page.md") for problem in found), found


def test_a_command_that_fails_is_found(root, tmp_path):
    docs_work.make_folder(root, tmp_path)
    assert docs_work.run("baton config recipes/tiny.yaml", tmp_path, root, SECONDS).returncode == 0
    assert docs_work.run("baton verify runs/none\nls", tmp_path, root, SECONDS).returncode == 2
