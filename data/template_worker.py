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
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes
    from jinja2.parser import Parser

MEMORY = 1 << 30
"""Bytes of address space of the process."""
LENGTH = 1 << 24
"""Characters of one rendered conversation."""


@cache
def _environment() -> "Environment":
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks answers for other programs; what is inside is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: "Parser") -> "nodes.Node":
            """The statements inside the tag, with a scope of their own as in transformers."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no name {name!r}")

    class PlainNamespace(Namespace):
        """A namespace without names that begin with an underscore. Its attributes are the template's values alone."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)  # one of them may be named `self`
            for name in values:
                check(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            Namespace.__setitem__(self, name, value)

    class PlainDict:
        """`dict` without its class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            """As `dict.fromkeys`."""
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, dict=PlainDict(), namespace=PlainNamespace)
    return environment


@lru_cache(maxsize=8)
def _compiled(source: str) -> "Template":
    return _environment().from_string(source)


def _render(
    request: dict[str, Any], messages: list[dict[str, Any]], generation: bool, tools: list[Any] | None
) -> dict[str, str]:
    """{"text": ...}; {"refused": why the template refuses the conversation}; or {"failed": the template's mistake}."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    try:
        text = _compiled(request["template"]).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=generation,
            strftime_now=datetime.fromisoformat(request["clock"]).strftime,
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
    _environment()  # what it imports does not count as the first template's time
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the parent decides when it ends
    for line in sys.stdin:
        request = json.loads(line)
        answers = []
        for messages, generation, tools in request["conversations"]:
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process, even in C code
            answers.append(_render(request, messages, generation, tools))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
