"""Reports: the page of `rnode report`, and what a sweep prints and writes at its end."""

import base64
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from jinja2 import Template
from matplotlib import pyplot as plt
from omegaconf import DictConfig
from rich.table import Table

from rnode.app.figures import choose_colours, plot_penalties, plot_training
from rnode.app.runs import Run, best, read_runs, tabulate
from rnode.app.summary import print_table
from rnode.errors import require
from rnode.training.loggers import finish_wandb
from rnode.training.results import RESULTS
from rnode.training.run_folder import whole_file


def main(cfg: DictConfig) -> None:
    """Write report.html about the runs and evaluations in and below the folders."""
    folders = [Path(folder).expanduser() for folder in cfg.folders]
    runs, problems = read_runs(folders)
    none = [f"folders={cfg.folders}: must be or hold folders of training runs"]
    require(bool(runs), "; ".join(problems or none))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    path = Path(HydraConfig.get().runtime.output_dir) / "report.html"
    write_report(runs, path, problems, read_evaluations(folders))
    print(f"{len(runs)} run(s); written to {path}")


def report_sweep(folder: Path, wandb: DictConfig | None) -> None:
    """Print a table of the jobs, write sweep.csv, sweep.png and report.html, and log them to W&B.

    The program exits with 1 unless all jobs finished.
    """
    jobs, problems = read_runs([folder])
    if jobs:
        header, rows = tabulate(jobs)
        table = Table(*header)
        for job, row in zip(jobs, rows, strict=True):
            table.add_row(*row, style="bold" if job is best(jobs) else None)
        print_table(table)
        write_sweep(jobs, folder, wandb)
        write_report(jobs, folder / "report.html", problems)
        print(f"written to {folder / 'sweep.csv'} and report.html")
    for job in [job for job in jobs if job.status != "finished"]:
        overrides = [f"{key}={value}" for key, value in job.swept.items()]
        problems.append(f"{job.status}: {' '.join([job.name, *overrides])}: {job.reason}")
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        sys.exit(1)


def write_sweep(jobs: list[Run], folder: Path, wandb: DictConfig | None) -> None:
    """Write the results and their map; log them as a W&B run in the group of the jobs."""
    columns = ["job", *jobs[0].swept, "status", *RESULTS]
    rows = [
        [job.name, *map(str, job.swept.values()), job.status, *map(job.result.get, RESULTS)]
        for job in jobs
    ]
    table = pl.DataFrame(rows, columns, orient="row", infer_schema_length=None)
    table.write_csv(folder / "sweep.csv")
    figure = plot_penalties(jobs)
    if figure is not None:
        figure.savefig(folder / "sweep.png", dpi=100)
    logger = (
        instantiate(wandb, folder=str(folder), name="sweep", group=folder.name) if wandb else None
    )
    if logger is not None:
        logger.log_table("sweep", columns, rows)
        if figure is not None:
            logger.log_image("sweep.png", [str(folder / "sweep.png")])
        finish_wandb()


def write_report(
    runs: list[Run],
    path: Path,
    problems: Iterable[str] = (),
    evaluations: Iterable[tuple[str, str, str]] = (),
) -> None:
    """Write a page about runs and their `read_evaluations`; `problems` says what it leaves out."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    colours = choose_colours(runs)
    header, rows = tabulate(runs)
    count = max(2, 12 // len(runs))  # pictures of each run, which make up most of the page
    text = Template(template, autoescape=True).render(
        title=path.absolute().parent.name,
        header=header,
        table=zip(runs, rows, strict=True),
        runs=runs,
        best=best(runs),
        colours=colours,
        curves=map(draw, plot_training(runs, colours)),
        penalties=map(draw, filter(None, [plot_penalties(runs)])),
        samples={run.name: list(read_samples(run, count)) for run in runs},
        evaluations=evaluations,
        problems=problems,
    )
    with whole_file(path, "w") as file:
        file.write(text)


def draw(figure: plt.Figure) -> str:
    """Return a figure as an address that contains it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return embed(buffer.getvalue(), "svg+xml")


def read_samples(run: Run, count: int) -> Iterator[tuple[str, str]]:
    """Yield names and addresses of at most `count` pictures of samples, the last among them."""
    paths = sorted((run.folder / "samples").glob("*.png"), reverse=True)
    for path in reversed(paths[:: max(1, math.ceil(len(paths) / count))]):
        name = f"step {int(path.stem)}" if path.stem.isdigit() else f"{path.stem} weights"
        yield name, embed(path.read_bytes())


def read_evaluations(folders: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield checkpoint, table and picture (if any) of the evaluations below the folders."""
    for file in sorted({file for folder in folders for file in folder.rglob("evaluation.json")}):
        picture = file.with_name("extremes.png")
        yield (
            json.loads(file.read_text(encoding="utf-8"))["ckpt_path"],
            file.with_name("evaluation.txt").read_text(encoding="utf-8"),
            embed(picture.read_bytes()) if picture.exists() else "",
        )


def embed(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
