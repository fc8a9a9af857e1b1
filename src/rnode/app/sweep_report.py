"""The report at the end of a sweep: a table, sweep.csv, and sweep.png over λ_K and λ_J."""

import csv
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rnode.app.sweep import DIVERGED, FAILED, OVERRIDES
from rnode.training.results import read_result

LAMBDAS = {"reg.lambda_k": r"$\lambda_K$", "reg.lambda_j": r"$\lambda_J$"}
COLUMNS = {
    "val/bits_per_dim": ("val bits/dim", "{:.4f}"),
    "test/bits_per_dim": ("test bits/dim", "{:.4f}"),
    "train/nfe_forward": ("NFE train", "{:.0f}"),
    "val/nfe_forward": ("NFE val", "{:.0f}"),
    "train/seconds": ("seconds", "{:.1f}"),
}
PANELS = ("val/bits_per_dim", "val/nfe_forward", "train/seconds")


class Job(NamedTuple):
    """How a job ended, as its folder says."""

    name: str  # of the folder, in the folder of the sweep
    swept: dict[str, str]  # the overrides in which the jobs differ
    status: str  # finished, failed, diverged or unfinished
    result: dict[str, float | None]  # of result.json; empty unless the job has finished
    line: str  # why the job has not finished


def report(folder: Path) -> None:
    """Print the table, write sweep.csv and sweep.png, and exit with 1 unless all jobs finished."""
    jobs = read_jobs(folder)
    unfinished = [job for job in jobs if job.status != "finished"]
    if len(unfinished) == len(jobs):
        print(f"no job of {folder} has finished")
    else:
        write_csv(jobs, folder / "sweep.csv")
        Console(highlight=False, markup=False).print(make_table(jobs))
        figure = plot_jobs(jobs)
        if figure is not None:
            figure.savefig(folder / "sweep.png", dpi=100)
        picture = "" if figure is None else " and sweep.png"
        print(f"written to {folder / 'sweep.csv'}{picture}")
    for job in unfinished:
        overrides = [f"{key}={value}" for key, value in job.swept.items()]
        print(f"{job.status}: {' '.join([job.name, *overrides])}: {job.line}", file=sys.stderr)
    if unfinished:
        sys.exit(1)


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs of a sweep in order of their names, 10 after 9."""
    files = {str(path.parent.parent.relative_to(folder)): path for path in folder.rglob(OVERRIDES)}
    overrides = {}
    for name in sorted(files, key=lambda name: re.sub(r"\d+", lambda n: n[0].zfill(9), name)):
        texts = (text.lstrip("+") for text in OmegaConf.load(files[name]) if "=" in text)
        overrides[name] = dict(text.split("=", 1) for text in texts)
    keys = dict.fromkeys(key for given in overrides.values() for key in given)
    keys = [key for key in keys if len({given.get(key) for given in overrides.values()}) > 1]
    return [
        Job(name, {key: given.get(key, "") for key in keys}, *read_end(folder / name))
        for name, given in overrides.items()
    ]


def read_end(folder: Path) -> tuple[str, dict[str, float | None], str]:
    """Return status, result and line of the job in `folder`."""
    for status, file in (("failed", FAILED), ("diverged", DIVERGED)):
        if (folder / file).exists():
            return status, {}, (folder / file).read_text(encoding="utf-8").strip()
    result = read_result(folder)
    if result is None:
        return "unfinished", {}, "was interrupted, or is still running"
    return "finished", result, ""


def write_csv(jobs: list[Job], path: Path) -> None:
    """Write a row per job; one job at least has finished."""
    names = next(list(job.result) for job in jobs if job.result)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *jobs[0].swept, "status", *names])
        for job in jobs:
            values = (job.result.get(name) for name in names)
            writer.writerow([job.name, *job.swept.values(), job.status, *values])


def make_table(jobs: list[Job]) -> Table:
    """Return a row per job; the one of the least validation bits/dim is bold."""
    labels = (label for label, _ in COLUMNS.values())
    table = Table("job", *jobs[0].swept, *labels)
    bits = [job.result.get("val/bits_per_dim") for job in jobs]
    least = min((value for value in bits if value is not None), default=None)
    for job, value in zip(jobs, bits, strict=True):
        numbers = [(job.result.get(name), form) for name, (_, form) in COLUMNS.items()]
        cells = ["" if number is None else form.format(number) for number, form in numbers]
        cells = cells if job.status == "finished" else [job.status, *cells[1:]]
        best = value is not None and value == least
        table.add_row(job.name, *job.swept.values(), *cells, style="bold" if best else None)
    return table


def plot_jobs(jobs: list[Job]) -> Figure | None:
    """Plot bits/dim, NFE and seconds against λ_K and λ_J; None if the sweep is over neither.

    Each choice of the other swept options has a row of panels. Seeds are averaged.
    """
    swept = [key for key in LAMBDAS if key in jobs[0].swept]
    jobs = [job for job in jobs if all(is_number(job.swept[key]) for key in swept)]
    if not swept or not jobs:
        return None
    rows: dict[str, list[Job]] = {}
    for job in jobs:
        others = (key for key in job.swept if key not in (*LAMBDAS, "seed"))
        rows.setdefault(" ".join(f"{key}={job.swept[key]}" for key in others), []).append(job)
    figure = Figure(figsize=(15, 4.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(PANELS), squeeze=False)
    for row, (title, members) in zip(axes, rows.items(), strict=True):
        for ax, name in zip(row, PANELS, strict=True):
            label, form = COLUMNS[name]
            ax.set_title(f"{label} – {title}" if title else label)
            places: dict[tuple[float, ...], list[float]] = {}
            for job in members:
                value = job.result.get(name)
                values = places.setdefault(tuple(float(job.swept[key]) for key in swept), [])
                values += [] if value is None else [value]
            means = {p: sum(v) / len(v) if v else math.nan for p, v in sorted(places.items())}
            plot_panel(ax, means, [LAMBDAS[key] for key in swept], form)
    return figure


def plot_panel(
    ax: Axes, means: dict[tuple[float, ...], float], labels: list[str], form: str
) -> None:
    """Plot a curve over one λ, a map over a grid of both, or points over scattered values of both.

    Args:
        ax: the axes.
        means: the value at each (λ,) or (λ_K, λ_J); NaN, plotted as ×, where no job has finished.
        labels: names of the swept λs.
        form: format of the values in a map.
    """
    ax.set_xlabel(labels[-1])
    shown = {place: mean for place, mean in means.items() if not math.isnan(mean)}
    if len(labels) == 1:
        ax.plot([x for (x,) in shown], list(shown.values()), "o-")
        return
    ax.set_ylabel(labels[0])
    ks, js = (sorted({place[i] for place in means}) for i in range(2))
    if 2 * len(means) < len(ks) * len(js):  # scattered, as a guided sweep chooses them
        failed = means.keys() - shown
        ax.plot([j for _, j in failed], [k for k, _ in failed], "x", color="0.5")
        image = ax.scatter([j for _, j in shown], [k for k, _ in shown], c=list(shown.values()))
    else:
        grid = [[means.get((k, j), math.nan) for j in js] for k in ks]
        image = ax.imshow(grid, origin="lower", aspect="auto")
        ax.set_xticks(range(len(js)), [f"{j:g}" for j in js])
        ax.set_yticks(range(len(ks)), [f"{k:g}" for k in ks])
        box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
        for (k, j), mean in means.items():
            text = "×" if math.isnan(mean) else form.format(mean)
            ax.text(js.index(j), ks.index(k), text, ha="center", va="center", bbox=box)
    ax.figure.colorbar(image, ax=ax)


def is_number(text: str) -> bool:
    """Return whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
