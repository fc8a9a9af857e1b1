"""Bits/dim, NFE and training time of a sweep over λ_K and λ_J."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnode.app.runs import COLUMNS, LAMBDAS, Run, is_number

PANELS = ("val/bits_per_dim", "val/nfe_forward", "train/seconds")


def plot_maps(jobs: list[Run]) -> Figure | None:
    """Plot bits/dim, NFE and seconds against λ_K and λ_J; None if the sweep is over neither.

    Each choice of the other swept options has a row of panels. Seeds are averaged.
    """
    swept = [key for key in LAMBDAS if key in jobs[0].swept]
    jobs = [job for job in jobs if all(is_number(job.swept[key]) for key in swept)]
    if not swept or not jobs:
        return None
    rows: dict[str, list[Run]] = {}
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
            plot_panel(ax, means, [f"${LAMBDAS[key]}$" for key in swept], form)
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
