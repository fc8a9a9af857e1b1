"""The end of a sweep: a table, sweep.csv, sweep.png over λ_K and λ_J, and report.html."""

import csv
import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from rnode.app.maps import plot_maps
from rnode.app.printing import print_table
from rnode.app.report import write_report
from rnode.app.runs import COLUMNS, LAMBDAS, Run, best, read_runs
from rnode.training.loggers import finish_wandb, wandb_logger


def report(folder: Path, wandb: DictConfig | None) -> None:
    """Print the table, write the files, and exit with 1 unless all jobs finished.

    The table and the picture are also logged as a W&B run, in the group of the jobs.
    """
    jobs, problems = read_runs([folder])
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    unfinished = [job for job in jobs if job.status != "finished"]
    if len(unfinished) == len(jobs):
        print(f"no job of {folder} has finished")
    else:
        with open(folder / "sweep.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(make_rows(jobs))
        print_table(make_table(jobs))
        figure = plot_maps(jobs)
        if figure is not None:
            figure.savefig(folder / "sweep.png", dpi=100)
        write_report(jobs, folder / "report.html", problems)
        if wandb is not None and wandb.mode != "disabled":
            log_to_wandb(jobs, folder, wandb)
        picture = "" if figure is None else "sweep.png and "
        print(f"written to {folder / 'sweep.csv'}, {picture}report.html")
    for job in unfinished:
        overrides = [f"{key}={value}" for key, value in job.swept.items()]
        print(f"{job.status}: {' '.join([job.name, *overrides])}: {job.line}", file=sys.stderr)
    if unfinished or problems:
        sys.exit(1)


def make_rows(jobs: list[Run]) -> list[list]:
    """Return the names of the columns, and a row for each job; one job at least has finished."""
    names = next(list(job.result) for job in jobs if job.result)
    rows = [["job", *jobs[0].swept, "status", *names]]
    for job in jobs:
        values = (job.result.get(name) for name in names)
        rows.append([job.name, *job.swept.values(), job.status, *values])
    return rows


def log_to_wandb(jobs: list[Run], folder: Path, wandb: DictConfig) -> None:
    """Log the table and the picture of a sweep."""
    options = {key: wandb[key] for key in wandb if key not in ("_target_", "folder")}
    options |= {"name": "sweep", "group": folder.name, "tags": []}
    logger = wandb_logger(str(folder), **options)
    header, *rows = make_rows(jobs)
    logger.log_table("sweep", header, rows)
    if (folder / "sweep.png").exists():
        logger.log_image("sweep.png", [str(folder / "sweep.png")])
    finish_wandb()


def make_table(jobs: list[Run]) -> Table:
    """Return a row per job; the one of the least validation bits/dim is bold."""
    labels = (label for label, _ in COLUMNS.values())
    table = Table("job", *(LAMBDAS.get(key, key) for key in jobs[0].swept), *labels)
    least = best(jobs)
    for job in jobs:
        cells = job.cells() if job.status == "finished" else [job.status, *job.cells()[1:]]
        style = "bold" if job.name in least else None
        table.add_row(job.name, *job.swept.values(), *cells, style=style)
    return table
