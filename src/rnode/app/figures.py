"""Figures that compare runs: curves of training, and likelihood and cost over λ_K and λ_J."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rnode.app.runs import LAMBDAS, Run, decimals
from rnode.training.plots import plot_band, subplots
from rnode.training.results import BITS, GAUSSIAN, MEASURES

COSTS = (BITS, "val/nfe_forward", "train/seconds")


def choose_colours(runs: list[Run]) -> dict[str, str]:
    """Return a colour for each label; runs that differ in their seed alone share one."""
    labels = list(dict.fromkeys(run.label() for run in runs))
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(labels)))
    return dict(zip(labels, map(to_hex, shades), strict=True))


def plot_training(runs: list[Run], colours: dict[str, str]) -> Iterator[Figure]:
    """Plot curves of the runs, with a band over seeds. What no run has measured has no figure."""
    curves = {BITS: "val/seconds_total"} | {f"train/{name}": "step" for name in MEASURES}
    for key, against in curves.items():
        if not any(key in row and against in row for run in runs for row in run.rows):
            continue
        figure, ((ax,),) = subplots(5, 3.4)
        for label, colour in colours.items():
            members = [run.curve(key, against) for run in runs if run.label() == label]
            plot_band(ax, members, color=colour)
        if key == BITS:
            ax.set_ylim(ax.get_ylim())  # a Gaussian that is far off is not shown
            for bits in {row[GAUSSIAN] for run in runs for row in run.rows if GAUSSIAN in row}:
                ax.axhline(bits, color="0.5", linestyle="--", zorder=0)
        ax.set(xlabel=against, ylabel=key)
        yield figure


def plot_penalties(runs: list[Run], costs: Sequence[str] = COSTS) -> Figure | None:
    """Plot maps of costs, by their names in result.json, over λ_K and λ_J, averaged over seeds.

    Returns:
        None if no run has a cost, if the runs share both λ or differ in other settings, or if they
        fill less than half of the grid, as those of a guided sweep do.
    """
    cells: dict[tuple, list[Run]] = {}
    for run in runs:
        place = tuple(run.settings.get(key) for key in LAMBDAS)
        if all(isinstance(value, float | int) for value in place):
            cells.setdefault(place, []).append(run)
    costs = [name for name in costs if any(name in run.result for run in runs)]
    if not costs or len(cells) < 2 or len({run.label(*LAMBDAS) for run in runs}) > 1:
        return None
    k, j = (sorted(set(values)) for values in zip(*cells, strict=True))
    if 2 * len(cells) < len(k) * len(j):
        return None
    figure, axes = subplots(4 * len(costs), 3.4, columns=len(costs))
    for ax, name in zip(axes.flat, costs, strict=True):
        grid = np.full((len(k), len(j)), np.nan)
        for place, members in cells.items():
            results = [run.result[name] for run in members if name in run.result]
            if results:
                grid[k.index(place[0]), j.index(place[1])] = np.mean(results)
        count = decimals(grid.flat, digits=4)
        for place in cells:
            y, x = k.index(place[0]), j.index(place[1])
            failed = np.isnan(grid[y, x])  # all runs
            text = "×" if failed else f"{grid[y, x]:.{count}f}"
            ax.text(x, y, text, ha="center", va="center", backgroundcolor="white")
        figure.colorbar(ax.imshow(grid, origin="lower", aspect="auto"), ax=ax, label=name)
        ax.set_xticks(range(len(j)), [f"{value:g}" for value in j])
        ax.set_yticks(range(len(k)), [f"{value:g}" for value in k])
        ax.set(xlabel="$λ_J$", ylabel="$λ_K$")
    return figure
