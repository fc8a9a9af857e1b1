"""Figures that compare runs: curves of training, and likelihood and cost over λ_K and λ_J."""

from collections.abc import Iterator

import numpy as np
import polars as pl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rnode.app.runs import COLUMNS, LAMBDAS, Run
from rnode.training.plots import COLOURS, plot_band
from rnode.training.results import BITS, GAUSSIAN, MEASURES

COSTS = (BITS, "val/nfe_forward", "train/seconds")
PANEL = {"figsize": (5, 3.4), "layout": "constrained"}


def choose_colours(runs: list[Run]) -> dict[str, str]:
    """Return a colour for each label; runs that differ in their seed alone share one."""
    labels = list(dict.fromkeys(run.label() for run in runs))
    shades = map(to_hex, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(labels))))
    return dict(zip(labels, COLOURS if len(labels) <= len(COLOURS) else shades, strict=False))


def plot_training(runs: list[Run], colours: dict[str, str]) -> Iterator[Figure]:
    """Plot curves of the runs, with a band over seeds, and the NFE against the Jacobian norm."""
    curves = {BITS: "val/seconds_total"} | {f"train/{name}": "step" for name in MEASURES}
    for key, against in curves.items():
        stage, name = key.split("/")
        figure, ax = plt.subplots(**PANEL)
        for label, colour in colours.items():
            members = [run for run in runs if run.label() == label]
            plot_band(ax, [run.curve(key, against) for run in members], color=colour)
        if name == "bits_per_dim":
            for bits in {round(y, 2) for run in runs for y in run.curve(GAUSSIAN, "step")[1]}:
                ax.axhline(bits, color="0.5", linestyle="--", linewidth=1)
                ax.text(ax.get_xlim()[0], bits, " Gaussian", va="bottom")
        xlabel = "training step" if against == "step" else "seconds of training"
        ax.set(xlabel=xlabel, ylabel=f"{stage} {MEASURES[name]}")
        yield figure
    figure, ax = plt.subplots(**PANEL)
    for run in runs:
        ax.scatter(*run.curve("train/nfe_forward", "train/jacobian"), s=12, c=colours[run.label()])
    ax.set(xlabel=MEASURES["jacobian"], ylabel=MEASURES["nfe_forward"])
    yield figure


def plot_penalties(runs: list[Run]) -> Figure | None:
    """Plot bits/dim, NFE and seconds over λ_K and λ_J; None if the runs differ in neither.

    Each choice of the other swept settings has a row of panels. Seeds are averaged.
    """
    swept = [key for key in LAMBDAS if key in runs[0].swept]
    runs = [run for run in runs if all(isinstance(run.swept[key], int | float) for key in swept)]
    table = pl.DataFrame(
        [
            {"title": run.label(*LAMBDAS)}
            | {key: float(run.swept[key]) for key in swept}
            | {name: run.result.get(name) for name in COSTS}
            for run in runs
        ],
        schema={"title": pl.String} | dict.fromkeys((*swept, *COSTS), pl.Float64),
    )
    means = table.group_by("title", *swept, maintain_order=True).mean()
    groups = {title: group for (title,), group in means.group_by("title", maintain_order=True)}
    groups = {title: group.sort(swept) for title, group in groups.items() if len(group) > 1}
    if not groups:
        return None
    figure = Figure(figsize=(15, 4.2 * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), squeeze=False).flat
    for part, (title, group) in zip(parts, groups.items(), strict=True):
        part.suptitle(title, fontsize="medium")
        for ax, name in zip(part.subplots(1, len(COSTS)), COSTS, strict=True):
            plot_result(ax, group, swept, name)
    return figure


def plot_result(ax: Axes, group: pl.DataFrame, swept: list[str], name: str) -> None:
    """Plot a result over one λ, as a map over a grid of both, or as points over other values.

    Where all runs failed, a curve has a gap, a map an × and the points have an empty circle.
    """
    label, form = COLUMNS[name]
    ax.set_xlabel(f"${LAMBDAS[swept[-1]]}$")
    ax.set_ylabel(label if len(swept) == 1 else f"${LAMBDAS[swept[0]]}$")
    if len(swept) == 1:
        ax.plot(group[swept[0]], group[name], "o-")
        return
    k, j, values = (group[key].to_numpy() for key in (*swept, name))
    rows, columns = np.unique(k), np.unique(j)
    if 2 * len(values) < len(rows) * len(columns):  # a guided sweep chose them
        image = ax.scatter(j, k, c=values, edgecolors="0.5", plotnonfinite=True)
    else:
        grid = np.full((len(rows), len(columns)), np.nan)
        y, x = np.searchsorted(rows, k), np.searchsorted(columns, j)
        grid[y, x] = values
        image = ax.imshow(grid, origin="lower", aspect="auto")
        ax.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        ax.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        for place in zip(x, y, values, strict=True):
            text = "×" if np.isnan(place[2]) else form.format(place[2])
            ax.text(*place[:2], text, ha="center", va="center", backgroundcolor="white")
    ax.figure.colorbar(image, ax=ax, label=label)
