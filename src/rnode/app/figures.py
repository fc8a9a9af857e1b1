"""Figures that compare runs: curves of training, and likelihood and cost over λ_K and λ_J."""

from collections.abc import Iterator

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rnode.app.runs import LAMBDAS, Run
from rnode.training.plots import plot_band
from rnode.training.results import BITS, MEASURES

COSTS = (BITS, "val/nfe_forward", "train/seconds")


def choose_colours(runs: list[Run]) -> dict[str, str]:
    """Return a colour for each label; runs that differ in their seed alone share one."""
    labels = list(dict.fromkeys(run.label() for run in runs))
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(labels)))
    return dict(zip(labels, map(to_hex, shades), strict=True))


def plot_training(runs: list[Run], colours: dict[str, str]) -> Iterator[Figure]:
    """Plot curves of the runs, with a band over seeds, and the NFE against the Jacobian norm."""
    curves = {BITS: "val/seconds_total"} | {f"train/{name}": "step" for name in MEASURES}
    for key, against in curves.items():
        figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
        for label, colour in colours.items():
            members = [run.curve(key, against) for run in runs if run.label() == label]
            plot_band(ax, members, color=colour)
        ax.set(xlabel=against, ylabel=key)
        yield figure
    figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for run in runs:
        ax.scatter(*run.curve("train/nfe_forward", "train/jacobian"), s=12, c=colours[run.label()])
    ax.set(xlabel="train/jacobian", ylabel="train/nfe_forward")
    yield figure


def plot_penalties(runs: list[Run]) -> Figure | None:
    """Plot maps of bits/dim, NFE and seconds over λ_K and λ_J; None if the runs share both.

    Each choice of the other swept settings has a row of maps, unless its runs fill less than half
    of the grid, as those of a guided sweep do. Seeds are averaged.
    """
    maps: dict[str, dict[tuple, list[Run]]] = {}
    for run in runs:
        place = tuple(run.settings.get(key) for key in LAMBDAS)
        if all(isinstance(value, float | int) for value in place):
            maps.setdefault(run.label(*LAMBDAS), {}).setdefault(place, []).append(run)
    for title, cells in list(maps.items()):
        k, j = map(set, zip(*cells, strict=True))
        if len(cells) == 1 or 2 * len(cells) < len(k) * len(j):
            del maps[title]
    if not maps:
        return None
    size = {"figsize": (15, 4.2 * len(maps)), "layout": "constrained"}
    figure, axes = plt.subplots(len(maps), len(COSTS), squeeze=False, **size)
    for row, (title, cells) in zip(axes, maps.items(), strict=True):
        for ax, name in zip(row, COSTS, strict=True):
            plot_map(ax, cells, name)
            ax.set(title=title, xlabel="$λ_J$", ylabel="$λ_K$")
    return figure


def plot_map(ax: Axes, cells: dict[tuple, list[Run]], name: str) -> None:
    """Plot a result over λ_K and λ_J, with an × where all runs failed."""
    k, j = (sorted(set(values)) for values in zip(*cells, strict=True))
    grid = np.full((len(k), len(j)), np.nan)
    for place, runs in cells.items():
        y, x = k.index(place[0]), j.index(place[1])
        results = [run.result[name] for run in runs if run.result.get(name) is not None]
        grid[y, x] = np.mean(results) if results else np.nan
        text = f"{grid[y, x]:.5g}" if results else "×"
        ax.text(x, y, text, ha="center", va="center", backgroundcolor="white")
    ax.figure.colorbar(ax.imshow(grid, origin="lower", aspect="auto"), ax=ax, label=name)
    ax.set_xticks(range(len(j)), [f"{value:g}" for value in j])
    ax.set_yticks(range(len(k)), [f"{value:g}" for value in k])
