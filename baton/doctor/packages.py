"""The versions of Python and of the packages against those that this project asks for."""

import platform
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from baton.doctor.finding import Finding, fault, ok, warning

_SUBJECT = "versions"
_NAME = "baton-align"
_SHOWN = ("torch", "transformers", "trl", "peft", "accelerate")
_DEVELOPERS = "dev"
"""The extra for those who work on this project."""
_PROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"
"""Is there in a checkout. What was installed from it may be older."""


def check_packages(extra: str | None) -> list[Finding]:
    """Checks every package that this project needs.

    Args:
        extra: the extra whose packages are needed, too. Those of other extras may be missing, not wrong.
    """
    asked = _asked(extra)
    found = []
    if not asked.python.contains(platform.python_version()):
        found.append(
            fault(_SUBJECT, f"this Python is {platform.python_version()}, and {asked.python} is needed: make the "
                  "virtual environment with another one (`make setup PYTHON=...`)")
        )  # fmt: skip
    for one in (*asked.base, *asked.of_extra):
        if _is_right(one):
            continue
        here = installed(one.name)
        has = "is not installed" if here is None else f"is {here}"
        found.append(fault(_SUBJECT, f"{one.name} {has}, and {_plain(one)} is needed: pip install '{_plain(one)}'"))
    for one in asked.optional:
        if installed(one.name) is not None and not _is_right(one):
            found.append(
                warning(_SUBJECT, f"{one.name} is {installed(one.name)}, which is not used as long as nothing asks for "
                        f"it, and would have to be {_plain(one)}: pip install '{_plain(one)}'")
            )  # fmt: skip
    if not found:
        shown = [f"{name} {installed(name)}" for name in (*_SHOWN, *(one.name for one in asked.of_extra))]
        found.append(ok(_SUBJECT, f"python {platform.python_version()}, {', '.join(shown)}"))
    return found


def installed(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class _Asked:
    """What this project asks for."""

    python: SpecifierSet
    base: list[Requirement]
    of_extra: list[Requirement]
    optional: list[Requirement]
    """Of the other extras."""


def _asked(extra: str | None) -> _Asked:
    if _PROJECT.is_file():
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
        python, base = project["requires-python"], list(map(Requirement, project["dependencies"]))
        extras = {name: list(map(Requirement, ones)) for name, ones in project["optional-dependencies"].items()}
    else:
        about, asked = metadata.metadata(_NAME), list(map(Requirement, metadata.requires(_NAME) or ()))
        python, base = about["Requires-Python"], [one for one in asked if one.marker is None]
        extras = {
            name: [one for one in asked if one.marker is not None and one.marker.evaluate({"extra": name})]
            for name in about.get_all("Provides-Extra") or ()
        }
    optional = [one for name, ones in extras.items() if name not in (extra, _DEVELOPERS) for one in ones]
    return _Asked(SpecifierSet(python), base, extras[extra] if extra else [], optional)


def _is_right(asked: Requirement) -> bool:
    here = installed(asked.name)
    return here is not None and asked.specifier.contains(here, prereleases=True)


def _plain(asked: Requirement) -> str:
    """Name and versions, as pip takes them."""
    return f"{asked.name}{asked.specifier}"
