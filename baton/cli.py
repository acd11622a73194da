"""The `baton` command. Each sub-command imports what it needs only when it runs, so that `--help` is fast."""

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from baton.export.commands import export, push
from handoff.errors import GateError, UserError
from training.terminal import Screen, lost, prepare, shown
from training.threads import settle

app = typer.Typer(
    name="baton",
    help="Brings a language model up in stages: tokenizer, pretraining, instruction tuning, reward model, PPO or DPO, "
    "evaluation.\n\nExit codes: 0 done; 1 a stage broke, `verify` or `replay` found a difference, or `doctor` a fault; "
    "2 a mistake in a recipe, in data or in the command; 3 a result below what the recipe demands; 128+n ended by "
    "signal n.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its boxes break lines inside the names of files
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, e.g. recipes/tiny.yaml.", show_default=False)]
NumMachines = Annotated[
    int | None, typer.Option(min=1, help="How many machines run a command together.", show_default=False)
]
MachineRank = Annotated[
    int | None,
    typer.Option(min=0, help="This machine's number among them; the one with 0 decides.", show_default=False),
]
MainProcessIp = Annotated[
    str | None, typer.Option(help="Name or address of the machine with rank 0.", show_default=False)
]
MainProcessPort = Annotated[
    int | None, typer.Option(help="A port of that machine; the next one is used, too.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values laid over the recipe: section.key=value ...", metavar="[KEY=VALUE]...", show_default=False
    ),
]
Sections = Annotated[
    list[str] | None,
    typer.Option(help="Only this section and what it needs; may be given several times.", show_default=False),
]
RunArgument = Annotated[
    Path, typer.Argument(help="A recipe, or the folder of its run, e.g. runs/tiny.", show_default=False)
]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Sections = None,
    force: Annotated[
        list[str] | None,
        typer.Option(help="Run this section from its start even if it is up to date.", show_default=False),
    ] = None,
    launch: Annotated[
        Path | None, typer.Option(help="An accelerate configuration, e.g. recipes/launch/ddp.yaml.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and why; run nothing.")] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often a stage that breaks or is killed is started again.")
    ] = 0,
    num_machines: NumMachines = None,
    machine_rank: MachineRank = None,
    main_process_ip: MainProcessIp = None,
    main_process_port: MainProcessPort = None,
) -> None:
    """Run the stages of a recipe that are not up to date, and print the reason for each.

    An interrupted stage resumes. A stage whose recipe, parent, data or code changed is run again; its earlier result is
    kept in <run>/.previous.

    On several machines, the same command runs on each; what is not given as an option is read from the launch file.
    """
    from baton.runner import run_pipeline
    from training.engines.launch import check_environment
    from training.engines.machines import place_of
    from training.recipe import load_recipe

    check_environment(launched=False)
    loaded = load_recipe(recipe, overrides or ())
    place = place_of(
        launch,
        num_machines=num_machines,
        machine_rank=machine_rank,
        main_process_ip=main_process_ip,
        main_process_port=main_process_port,
    )
    code = run_pipeline(loaded, to or (), force or (), launch, dry_run=dry_run, place=place, max_restarts=max_restarts)
    sys.exit(code)


@app.command()
def rehearse(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Sections = None,
    launch: Annotated[
        Path | None,
        typer.Option(help="An accelerate configuration, e.g. recipes/launch/cpu2_zero3.yaml.", show_default=False),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the rehearsal's folder.")] = False,
) -> None:
    """Run every stage of a recipe once in about a minute, with tiny models of the same architectures and a sample of
    its data, before the real run is paid for.

    Nothing of the recipe's own run is changed. Says what it has checked and what it cannot check. Exit code 2, with the
    stage's own error, when a stage fails.
    """
    from baton.rehearse import rehearse as rehearsed
    from training.engines.launch import check_environment

    check_environment(launched=False)
    sys.exit(rehearsed(recipe, overrides or (), to or (), launch, keep=keep))


@app.command()
def status(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Show the state of each stage: up to date, stale (with the reason), unfinished, or new."""
    from baton.status import print_overview
    from training.recipe import load_recipe

    print_overview(load_recipe(recipe, overrides or ()))


@app.command()
def top(
    target: RunArgument,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a running training live: each stage's step, rate, time left, loss, reward, KL and memory.

    Reads the run's files alone, so the run may be on another machine that shares the folder. Ctrl-C ends it. Without a
    terminal, it prints once.
    """
    from baton.top import top as shown_live

    shown_live(target, interval)


@app.command()
def verify(target: RunArgument) -> None:
    """Hash every published file and saved state of a run and its lineage again, and check that each stage still has the
    parents from which it was made. Of the folder of an export, its files.

    Exit code 1 when something differs.
    """
    from baton.export.record import is_export, verify_export
    from baton.runs import run_dir_of
    from handoff.refused import read_refused, refused_sections
    from handoff.verify import lineage, verify_run

    if is_export(target):
        verify_export(target)
        print(shown(f"{target}: every file is as it was exported"))
        return
    run_dir = run_dir_of(target)
    problems = verify_run(run_dir)
    for problem in problems:
        place = "/".join(part for part in (problem.stage, problem.file) if part)
        print(shown(f"{run_dir}/{place}: {problem.message}"), file=sys.stderr)
    if problems:
        sys.exit(1)
    stages = lineage(run_dir)
    if not stages:
        raise UserError(f"{run_dir}: no stage has been published here; `baton run <recipe>` makes one")
    for stage in stages:
        parents = ", ".join(f"{parent.name} {parent.fingerprint[:8]}" for parent in stage.parents.values())
        print(shown(f"  {stage.stage:<12} {stage.fingerprint[:8]}{'  from ' + parents if parents else ''}"))
    for section in refused_sections(run_dir):
        failed = read_refused(run_dir, section)
        if failed is not None:
            print(
                shown(f"  {section}: below its gate: {'; '.join(failed.reasons)}; not published, kept in {failed.path}")
            )
    print(f"{run_dir}: every file is as it was published, and every stage was made from the parents that are here")


@app.command()
def clean(target: RunArgument) -> None:
    """Remove results that a changed recipe has set aside, and what the next start makes again.

    Encoded rows and unpacked GGUF files belong to all runs under the same output_root; none of these may be running.
    """
    from baton.clean import clean as remove
    from handoff.files import human_bytes
    from training.recipe import load_recipe

    run_dir = target if target.is_dir() else load_recipe(target).run_dir
    for path, size in (removed := remove(run_dir)):
        print(shown(f"removed {path} ({human_bytes(size)})"))
    if not removed:
        print("nothing to remove")


@app.command()
def replay(
    target: RunArgument,
    stage: Annotated[str, typer.Option(help="The section whose step it is.", show_default=False)],
    step: Annotated[int, typer.Option(min=1, help="The step, or the iteration.", show_default=False)],
) -> None:
    """Repeat one training step from the nearest saved state before it, and compare it with metrics.jsonl.

    The run's directory is not changed. Exit code 1 when loss or gradient norm differs.
    """
    from baton.replay import replay_step
    from baton.runs import run_dir_of
    from training.engines.launch import check_environment
    from training.signals import Stopped

    check_environment(launched=False)
    try:
        found = replay_step(run_dir_of(target), stage, step)
    except Stopped as stopped:
        sys.exit(stopped.code)
    print(shown(found.told()))
    if not found.agrees:
        sys.exit(1)


@app.command()
def config(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    section: Annotated[str | None, typer.Option(help="Only this section.", show_default=False)] = None,
) -> None:
    """Print the recipe with every value that will be used, the origin of each value, and the models that each section
    will have in memory."""
    from baton.show import show_recipe
    from training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    print(shown(show_recipe(loaded, None if section is None else loaded.section(section))), end="")


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(help="A checkpoint directory, a .gguf file, or a model id of the hub.", show_default=False)
    ],
    data: Annotated[list[str], typer.Argument(help="Files, folders, or names of hub data sets.", show_default=False)],
    method: Annotated[
        str | None, typer.Option(help="sft, dpo, grpo or rlhf; by default what the data are for.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; by default MODEL-METHOD.yaml.", show_default=False)
    ] = None,
) -> None:
    """Write a recipe for a model and data, with defaults for their size and format, and the reason for every value.

    No file is overwritten.
    """
    from baton.init import init as written

    path = written(model, data, method, output)
    print(shown(f"wrote {path}; next: baton plan {path}, baton rehearse {path}, baton run {path}"))


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(help="An accelerate configuration, e.g. recipes/launch/zero3.yaml.", show_default=False),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="What each process runs on, e.g. h100; by default this machine's CPU.", show_default=False),
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Also say what to change so that everything fits.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also measure: three steps of each section on its longest rows.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what each section will take before it is run: models, memory of a process, disk, tokens, time; whether it
    fits, and what to change where it does not.

    Nothing is loaded or started, unless with --probe.
    """
    from baton.plan import plan as planned
    from baton.plan_shown import as_json, show_plan

    found = planned(recipe, overrides or (), launch, gpu)
    if probe:
        from baton.probe import probed

        found = probed(found, launch)
    if json:
        import json as encoder

        print(encoder.dumps(as_json(found), indent=2))
    else:
        print(shown(show_plan(found, fit=fit)), end="")


@app.command()
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="Also check what this recipe needs, e.g. recipes/tiny.yaml.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(help="An accelerate configuration, e.g. recipes/launch/ddp_2nodes.yaml.", show_default=False),
    ] = None,
    num_machines: NumMachines = None,
    machine_rank: MachineRank = None,
    main_process_ip: MainProcessIp = None,
    main_process_port: MainProcessPort = None,
) -> None:
    """Check this machine before a training: versions, GPUs, network, ports, clock, storage, disk, limits, and an
    all-reduce between the processes of a launch file.

    Every fault is named with its mend. Nothing is changed. Exit code 1 when there is a fault; warnings do not count.
    """
    from baton.doctor import doctor as examined

    code = examined(
        recipe,
        overrides or (),
        launch,
        num_machines=num_machines,
        machine_rank=machine_rank,
        main_process_ip=main_process_ip,
        main_process_port=main_process_port,
    )
    sys.exit(code)


@app.command()
def report(
    target: RunArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; by default <run>/report.html.", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page about a run."""
    from baton.report import build
    from baton.runs import run_dir_of

    print(build(run_dir_of(target), output))


@app.command()
def compare(
    target: RunArgument,
    before: Annotated[str, typer.Argument(help="The earlier model.", show_default=False)],
    after: Annotated[str, typer.Argument(help="The later model.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="Only this task.", show_default=False)] = None,
    worse: Annotated[bool, typer.Option("--worse", help="Only answers that became worse.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="How many answers are shown; 0: all.")] = 20,
    evaluation: Annotated[
        str | None, typer.Option(help="Which evaluation, if the run has several.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead.")] = False,
) -> None:
    """Show prompt, both answers and their scores for two models of an evaluation, the largest loss first."""
    from baton.compare import compare as compared
    from baton.runs import run_dir_of

    compared(run_dir_of(target), before, after, task=task, worse=worse, limit=limit, section=evaluation, as_json=json)


@app.command()
def chat(
    target: Annotated[
        Path, typer.Argument(help="A recipe, the folder of its run, or the folder of a model.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Which section to talk to; by default the newest aligned one.", show_default=False),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None, typer.Option(help="Two sections that answer side by side.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="An answer is cut off here.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
) -> None:
    """Talk to a model in the terminal. /quit ends, /reset starts a new conversation, /system TEXT sets the system
    message."""
    from baton.chat import talk
    from training.engines.launch import check_environment

    check_environment(launched=False)
    talk(target, model, compare, system, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


@app.command()
def serve(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="What to serve: RUN or RUN:SECTION (RUN is a recipe or a run's folder), the folder of a model, a "
            ".gguf file, or a model id of the hub. Several are served under their names.",
            metavar="TARGET...",
            show_default=False,
        ),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every network's.")] = "127.0.0.1",
    engine: Annotated[
        Literal["auto", "inprocess", "vllm"], typer.Option(help="auto: vLLM where a GPU and vLLM are there.")
    ] = "auto",
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the key that clients must show; or set BATON_API_KEY.", show_default=False),
    ] = None,
    pooling: Annotated[
        Literal["mean", "last"], typer.Option(help="Which hidden state of the last layer is a text's embedding.")
    ] = "mean",
    batch_size: Annotated[int, typer.Option(min=1, help="Answers that are decoded at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are refused with 429.")] = 64,
    max_n: Annotated[int, typer.Option(min=1, help="Answers that one request may ask for.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its answer together.")] = 4096,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a page to chat on, at the address itself.")] = False,
    preferences: Annotated[
        Path | None,
        typer.Option(
            help="Where the page keeps which of two answers you prefer; by default preferences.jsonl in the folder of "
            "the first model's run.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve models over HTTP, as OpenAI's clients know it: chat, completions, embeddings.

    SIGTERM lets running answers end.
    """
    from training.engines.launch import check_environment

    check_environment(launched=False)
    from baton.serve.settings import Limits, need_packages

    need_packages()
    from baton.serve.run import serve as served

    limits = Limits(batch_size=batch_size, queue=queue, max_n=max_n, max_length=max_length)
    code = served(
        targets,
        host=host,
        port=port,
        engine=engine,
        key_file=api_key_file,
        pooling=pooling,
        limits=limits,
        ui=ui,
        preferences=preferences,
    )
    sys.exit(code)


app.command()(export)
app.command()(push)


def main() -> NoReturn:
    """Entry point of the console script. For a user's mistake it prints a message, not a traceback, and exits."""
    prepare()
    settle()
    code: str | int | None
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        fail(f"{error.format_message()}\n`baton --help` and `baton COMMAND --help` say what can be given", 2)
    except UserError as error:
        fail(str(error), 2)
    except GateError as error:
        fail(str(error), 3)
    except OSError as error:  # a file or folder that cannot be used, wherever a command meets it
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    if not code and (reason := lost()) is not None:
        fail(f"the output could not be written: {reason}", 1)
    sys.exit(code or 0)


def fail(message: str, code: int) -> NoReturn:
    """Prints the message to stderr, in red if that is a terminal, and exits with the code."""
    Screen(stderr=True).print(message, style="red")
    sys.exit(code)
