"""The process that renders chat templates. data/rendering.py starts it as a script and talks to it in lines of JSON.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files and from Python's inner
parts, but not from loops without end or from texts of gigabytes. So it runs here, with a limit of processor time for
each conversation, after which the operating system ends the process, and with a limit of memory.

The environment is that of transformers' `apply_chat_template`, written out, because importing transformers takes longer
than all else here. A test compares the two. The clock is the one that the request names.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 30
"""Bytes of address space of the process."""
LENGTH = 1 << 24
"""Characters of one rendered conversation."""


class _Generation(Extension):
    """`{% generation %}` marks answers for other programs; what is inside is rendered as it is."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The statements inside the tag, with a scope of their own as in transformers."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore. Its attributes are the template's values alone."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)  # one of them may be named `self`
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no name {name!r}")


class _Dict:
    """`dict` without its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, dict=_Dict(), namespace=_PlainNamespace)
    return environment.from_string(source)


def _render(request: dict[str, Any], messages: list[dict[str, Any]], generation: bool) -> dict[str, str]:
    """{"text": ...}; {"refused": why the template refuses the conversation}; or {"failed": the template's mistake}."""
    clock = datetime.fromisoformat(request["clock"])
    try:
        text = _compiled(request["template"]).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=generation,
            strftime_now=clock.strftime,
            **request["variables"],
        )
    except (TemplateSyntaxError, SecurityError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    except TemplateError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # the template's own mistake can be of any type
        return {"failed": f"{type(error).__name__}: {error}"}
    if len(text) > LENGTH:
        return {"failed": f"it makes more than {LENGTH} characters of one conversation"}
    return {"text": text}


def main() -> None:
    """Answers requests until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    for line in sys.stdin:
        request = json.loads(line)
        answers = []
        for messages, generation in request["conversations"]:
            signal.setitimer(
                signal.ITIMER_PROF, request["seconds"]
            )  # its signal ends the process, also inside a long C function
            answers.append(_render(request, messages, generation))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
