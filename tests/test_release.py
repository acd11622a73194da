"""Versions in pyproject.toml, CHANGELOG.md and git's tags; and the hooks that run before a commit."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

VERSION = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
HEADING = rf"\[{VERSION}\] - \d{{4}}-\d{{2}}-\d{{2}}"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def packaged(root: Path) -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def released(root: Path) -> list[str]:
    """The versions that the changelog has as released, as they stand there."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    return re.findall(rf"^## \[({VERSION.replace('(', '(?:')})\]", text, re.MULTILINE)


def test_the_changelog_begins_with_what_is_unreleased_and_has_the_newest_version_first(root: Path) -> None:
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert [heading for heading in headings[1:] if not re.fullmatch(HEADING, heading)] == []
    versions = [numbers(version) for version in released(root)]
    assert versions == sorted(set(versions), reverse=True) and len(versions) == len(headings) - 1
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_packaged_version_is_the_newest_release_or_the_next(root: Path) -> None:
    version = packaged(root)
    assert re.fullmatch(VERSION, version)
    assert all(numbers(version) >= numbers(other) for other in released(root))


def test_every_tag_is_a_released_version(root: Path) -> None:
    done = subprocess.run(["git", "tag", "--list", "v*"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    assert set(done.stdout.split()) <= {f"v{version}" for version in released(root)}


def test_the_hooks_before_a_commit_are_the_commands_of_make_lint(root: Path) -> None:
    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"], "others are downloaded"
    hooks = config["repos"][0]["hooks"]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert lint is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in lint.group(1).splitlines()]
    assert [hook["entry"] for hook in hooks] == commands


def test_every_tool_of_make_lint_is_locked_and_in_the_dev_extra(root: Path) -> None:
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    extra = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"][
        "dev"
    ]
    for tool in ("ruff", "mypy", "codespell"):
        assert re.search(rf"^{tool}==", lock, re.MULTILINE)
        assert any(re.match(rf"{tool}\b", requirement) for requirement in extra)


def test_mypy_checks_every_package(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    packages = {path.parent.name for path in root.glob("*/__init__.py")} - {"tests"}
    assert settings["strict"] and set(settings["files"]) == packages
