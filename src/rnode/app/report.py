"""Reports: the page of `rnode report`, and what a sweep prints and writes at its end."""

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from hydra.core.hydra_config import HydraConfig
from jinja2 import Template
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.table import Table

from rnode.app.figures import COSTS, choose_colours, plot_penalties, plot_training
from rnode.app.runs import COLUMNS, Run, compare, decimals, read_runs, tabulate
from rnode.app.summary import print_table
from rnode.errors import require
from rnode.training.plots import save_figure
from rnode.training.results import BITS, RESULTS
from rnode.training.run_folder import whole_file


def main(cfg: DictConfig) -> None:
    """Write report.html about the runs in and below the folders."""
    runs, problems = read_runs([Path(folder).expanduser() for folder in cfg.folders])
    none = f"folders={cfg.folders}: must be or hold folders of training runs"
    require(bool(runs), "; ".join(problems) or none)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    path = Path(HydraConfig.get().runtime.output_dir) / "report.html"
    write_report(runs, path, problems)
    print(f"{len(runs)} run(s); written to {path}")


def report_sweep(folder: Path) -> None:
    """Print a table of the jobs, and write sweep.csv, sweep.png and report.html.

    The program exits with 1 unless all jobs finished.
    """
    jobs, problems = read_runs([folder])
    if jobs:
        header, rows = tabulate(jobs)
        table = Table(*header)
        for row in as_texts(rows):
            table.add_row(*row)
        print_table(table)
        (_, *columns), rows = tabulate(jobs, RESULTS)
        frame = pl.DataFrame(rows, ["job", *columns], orient="row", infer_schema_length=None)
        frame.write_csv(folder / "sweep.csv")
        if figure := plot_penalties(jobs):
            save_figure(figure, folder / "sweep.png")
        write_report(jobs, folder / "report.html", problems)
        print(f"written to {folder / 'sweep.csv'} and report.html")
    for job in (job for job in jobs if job.status != "finished"):
        overrides = [f"{key}={value}" for key, value in job.swept.items()]
        problems.append(f"{job.status}: {' '.join([job.name, *overrides])}: {job.reason}")
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        sys.exit(1)


def write_report(runs: list[Run], path: Path, problems: Sequence[str] = ()) -> None:
    """Write a page about runs; `problems` says what it leaves out."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    names = dict.fromkeys(run.data for run in runs)
    text = Template(template, autoescape=True).render(
        title=path.absolute().parent.name,
        sections=[describe(name, [run for run in runs if run.data == name]) for name in names],
        runs=runs,
        problems=problems,
    )
    with whole_file(path, "w") as file:
        file.write(text)


def describe(name: str, runs: list[Run]) -> dict[str, Any]:
    """Return what the page shows of the runs of one data set. The best of them is bold."""
    compare(runs)
    for run in runs:
        run.swept.pop("dataset", None)  # the heading names it
    colours = choose_colours(runs)
    measured = [c for c in COLUMNS if any(c in run.result for run in runs)]
    header, rows = tabulate(runs, measured)
    bits = {run: run.result[BITS] for run in runs if BITS in run.result}
    samples = {run.name: run.folder / "samples.png" for run in runs}
    figures = [*plot_training(runs, colours), *(plot_penalties(runs, [cost]) for cost in COSTS)]
    return {
        "name": name,
        "header": header,
        "table": list(zip(runs, as_texts(rows), strict=True)),
        "best": min(bits, key=bits.get, default=None),
        "colours": colours,
        "figures": [draw(figure) for figure in figures if figure is not None],
        "samples": {
            name: embed(file.read_bytes(), "png") for name, file in samples.items() if file.exists()
        },
    }


def as_texts(rows: list[list]) -> list[tuple[str, ...]]:
    """Return the cells of a table as texts; the numbers of a column have equal decimals."""
    columns = []
    for cells in zip(*rows, strict=True):
        count = decimals([cell for cell in cells if isinstance(cell, float | int)], digits=5)
        columns.append([as_text(cell, count) for cell in cells])
    return list(zip(*columns, strict=True))


def as_text(cell: str | float | None, count: int) -> str:
    return cell if isinstance(cell, str) else "" if cell is None else f"{cell:.{count}f}"


def draw(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return embed(buffer.getvalue(), "svg+xml")


def embed(picture: bytes, kind: str) -> str:
    """Return a picture as an address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
