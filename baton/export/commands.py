"""The commands `baton export` and `baton push`. No torch here."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from training.terminal import shown


def export(
    target: Annotated[
        str,
        typer.Argument(
            help="RUN[:stage], e.g. runs/tiny:sft; or the folder or .gguf file of a model.", show_default=False
        ),
    ],
    to: Annotated[str, typer.Option(help="hf, gguf, ollama, onnx or vllm.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="f32, f16, bf16; for gguf and ollama also q8_0, q4_0. By default f16 there, else as published.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder; by default RUN/exports/STAGE-FORM-PRECISION.", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare the answers of the export with those of the stage.")] = True,
) -> None:
    """Write a stage's model in a form that other programs read, and check that it answers as the stage does.

    An export that does not is removed, and the exit code is 2.
    """
    from baton.export.run import export as exported
    from training.engines.launch import check_environment

    check_environment(launched=False)
    folder = exported(target, to, dtype, out, lambda line: print(shown(line), file=sys.stderr), check=check)
    print(shown(str(folder)))


def push(
    target: Annotated[str, typer.Argument(help="RUN[:stage], or the folder of a model.", show_default=False)],
    repository: Annotated[
        str, typer.Argument(help="Where to, on the hub: ORGANISATION/NAME.", metavar="ORG/NAME", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="The form, as for export.")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="The precision, as for export.", show_default=False)] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a repository that is made.")] = False,
) -> None:
    """Export a stage's model, check it, and upload it with its model card to the hub, private by default.

    Refused if the model did not pass the gate of its evaluation.
    """
    from baton.export.push import push as pushed
    from training.engines.launch import check_environment

    check_environment(launched=False)
    said = pushed(target, repository, to, dtype, lambda line: print(shown(line), file=sys.stderr), public=public)
    print(shown(said))
