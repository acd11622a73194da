"""The report of a run: one self-contained HTML file.

    baton report recipes/tiny.yaml      # writes runs/tiny/report.html

It is made from the files in the run's directory (manifests, metrics.jsonl, samples.jsonl, the evaluation's
results.json), so it also works for an unfinished run: it names missing parts, with the command that makes them.
"""

from pathlib import Path


def build(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the report of the run in `run_dir` to `output` (by default `<run_dir>/report.html`) and returns its path.

    Raises:
        UserError: `run_dir` is not a directory, or no stage was started in it.
    """
    from baton.report.collect import read_run
    from baton.report.page import render

    output = output or run_dir / "report.html"
    html = render(read_run(run_dir))
    partial = output.with_name(f".{output.name}.partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(output)
    return output
