"""Plots and verdicts of Figures 1 to 5 and Table 1, from the runs of `rnode.paper.runs`.

Each function writes a PNG and a CSV at `path`, and returns a verdict in words.
"""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from rnode.paper.runs import ARXIV, BOTH_PENALTIES, LABELS, PUBLISHED, RATIO, Job, speed_ups
from scipy.stats import spearmanr

import rnode
from rnode.data.datamodule import DataModule
from rnode.evaluation import evaluate
from rnode.flow import Flow
from rnode.training.plots import image_grid, plot_band, save_figure

SAME = 0.02  # bits/dim within which two likelihoods count as equal at these sizes
COLOURS = {"ffjord": "C0", "fast": "C1", "rnode": "C2", "rnode_adaptive": "C5"}
COLOURS |= {"kinetic": "C3", "jacobian": "C4", "unregularized": "C6"}


def make_panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple:
    """Return a figure and its (rows, columns) axes of this size in inches each."""
    whole = (columns * size[0], rows * size[1])
    return plt.subplots(
        rows, columns, figsize=whole, layout="constrained", squeeze=False, **options
    )


def save(figure: plt.Figure, path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write the PNG and the CSV of a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path.with_suffix(".png"))
    with open(path.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{cell:.5g}" if isinstance(cell, float) else cell for cell in row])


def verdict(held: bool, what: str) -> str:
    return f"The paper's claim {'holds' if held else 'does not hold'} here: {what}"


def load(run: Job) -> tuple[DataModule, Flow]:
    """Return the data of a finished run, and its flow on the accelerator if there is one."""
    torch.manual_seed(0)
    density = rnode.load(run.folder, trust=["rnode"])  # our own run
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return density.data_, density.flow_.to(accelerator or "cpu")


@torch.no_grad()
def plot_figure_1(runs: list[Job], path: Path) -> str:
    """Trajectories of flows on the line: a generic one, and one with penalties from f = 0 on.

    The trajectories are of the first seed, and the verdict is over all seeds.
    """
    recipes = dict.fromkeys(run.recipe for run in runs)
    figure, axes = make_panels(1, len(recipes), (5, 5), sharey=True)
    rows, measured = [], {recipe: [] for recipe in recipes}
    panels = dict(zip(recipes, axes[0], strict=True))
    for run in runs:
        data, flow = load(run)
        data.setup()
        batches = data.eval_dataloader("test")
        measured[run.recipe].append(evaluate(flow, data.transform, batches, noises=1, seed=0)[0])
        if run.seed > 0:
            continue
        ax = panels[run.recipe]
        z = torch.linspace(-2.5, 2.5, 41)[:, None].to(next(flow.parameters()))
        frames = flow.trajectory(z, intervals=64)[..., 0].cpu()  # from T to 0
        x = torch.linspace(-4, 4, 400)[:, None]
        density = flow.log_prob(x.to(z)).exp().cpu()
        normal = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        time = torch.linspace(len(flow.pieces), 0, len(frames))
        ax.plot(time, frames, color=COLOURS[run.recipe], linewidth=0.8)
        ax.plot(-0.5 * density, x, color="0.3")
        ax.plot(time[0] + 0.5 * normal, x, color="0.3")
        start = "f ≠ 0" if run.recipe == "ffjord" else "f = 0"
        ax.set(xlabel="t", ylabel="z(t)", xticks=[0, time[0] / 2, time[0]])
        ax.set_title(f"{LABELS[run.recipe]}, {start} at the start")
        for number, trajectory in enumerate(frames.T.tolist()):
            points = zip(time.tolist(), trajectory, strict=True)
            rows += [(run.recipe, number, *point) for point in points]
    save(figure, path, ("recipe", "trajectory", "t", "z"), rows)
    if len(measured) < 2:
        return "The runs of one of the two flows are missing."
    measures = {
        "bits/dim": "bits_per_dim",
        "straightness (0: straight)": "straightness",
        "kinetic energy": "kinetic",
        "NFE": "nfe",
    }
    ours, theirs = (
        {key: [summary[key] for summary in measured[recipe]] for key in measures.values()}
        for recipe in ("rnode_adaptive", "ffjord")
    )
    difference = statistics.fmean(ours["bits_per_dim"]) - statistics.fmean(theirs["bits_per_dim"])
    held = abs(difference) < SAME and max(ours["straightness"]) < min(theirs["straightness"])
    words = [
        f"{name} {mean_and_extremes(ours[key], '.4g')} and {mean_and_extremes(theirs[key], '.4g')}"
        for name, key in measures.items()
    ]
    seeds = len(measured["rnode_adaptive"])
    what = f"RNODE and the generic flow, means and extremes of {seeds} seeds: "
    return verdict(held, f"{what}{'; '.join(words)}.")


def plot_figure_2(runs: list[Job], path: Path) -> str:
    """Validation bits/dim against training time; a band from the lowest to the highest seed."""
    names = list(dict.fromkeys(run.data for run in runs))
    figure, axes = make_panels(1, len(names), (6, 4.5))
    rows, words, held = [], [], True
    for ax, data in zip(axes[0], names, strict=True):
        members = [run for run in runs if run.data == data]
        for recipe in dict.fromkeys(run.recipe for run in members if run.finished):
            seeds = [run for run in members if run.recipe == recipe and run.finished]
            bits = [run.by_epoch("val/bits_per_dim")[: len(run.seconds)] for run in seeds]
            curves = [(run.seconds, y) for run, y in zip(seeds, bits, strict=True)]
            plot_band(ax, curves, label=LABELS[recipe], color=COLOURS[recipe])
            for run, curve in zip(seeds, curves, strict=True):
                points = enumerate(zip(*curve, strict=True))
                rows += [(data, recipe, run.seed, epoch, *point) for epoch, point in points]
        ratios = speed_ups(members)
        for recipe, values in ratios.items():
            words.append(f"{data}: {LABELS[recipe]} {sooner(values)}")
        held &= any(min(values) >= 1 for values in ratios.values())
        ax.set(xlabel="seconds of training", ylabel="validation bits/dim", title=data)
        ax.legend(loc="upper right")  # curves fall
    save(figure, path, ("data", "recipe", "seed", "epoch", "seconds", "val bits/dim"), rows)
    return verdict(held, f"{'; '.join(words)}.")


def spread(ratios: list[float]) -> str:
    """Return mean, least and largest of the ratios over seeds; a ratio of 0 stands for never."""
    if not ratios:
        return "–"
    if missed := ratios.count(0.0):
        return f"not reached by {missed} of {len(ratios)}"
    return mean_and_extremes(ratios, ".2f")


def mean_and_extremes(values: list[float], form: str) -> str:
    """Return a mean, and the least and the largest value if there are several."""
    several = len(values) > 1
    extremes = f" ({min(values):{form}} – {max(values):{form}})" if several else ""
    return f"{statistics.fmean(values):{form}}{extremes}"


def sooner(ratios: list[float]) -> str:
    """Return how much sooner than FFJORD the seeds of a recipe reached FFJORD's likelihood."""
    if 0.0 in ratios:
        return f"did not reach FFJORD's bits/dim at {ratios.count(0.0)} of {len(ratios)} seeds"
    return f"reached FFJORD's bits/dim {spread(ratios)} times sooner than FFJORD"


def plot_figure_3(runs: list[Job], path: Path) -> str:
    """NFE of the adaptive solver against the Jacobian norm while FFJORD trains."""
    run, keys = runs[0], ("step", "train/jacobian", "train/nfe_forward")
    logged = [row for row in run.rows if all(key in row for key in keys)]
    steps, jacobian, nfe = ([float(row[key]) for row in logged] for key in keys)
    correlation, p = spearmanr(jacobian, nfe)
    figure, ((ax,),) = make_panels(1, 1, (5.5, 4.5))
    figure.colorbar(ax.scatter(jacobian, nfe, c=steps, s=14), label="training step")
    ax.set(xlabel="squared Jacobian norm / d", ylabel="NFE (forward)")
    ax.set_title(f"{run.data}, {LABELS[run.recipe]}")
    save(
        figure, path, ("step", "jacobian", "nfe"), zip(map(int, steps), jacobian, nfe, strict=True)
    )
    what = f"the rank correlation is {correlation:.2f} (p = {p:.1g}) over {len(logged)} steps."
    return verdict(correlation > 0 and p < 0.01, what)


def plot_figure_4(runs: list[Job], path: Path) -> str:
    """Jacobian norm and kinetic energy under each penalty; a run that diverged ends in a cross."""
    figure, (axes,) = make_panels(1, 2, (5.5, 4.5))
    rows, last = [], {}
    for run in runs:
        curves = [run.by_epoch(f"train/{key}") for key in ("jacobian", "kinetic")]
        last[run.recipe] = [curve[-1] if curve else math.nan for curve in curves]
        rows += [
            (run.recipe, epoch, *pair) for epoch, pair in enumerate(zip(*curves, strict=True), 1)
        ]
        for ax, curve in zip(axes, curves, strict=True):
            epochs = range(1, len(curve) + 1)
            ax.plot(epochs, curve, label=LABELS[run.recipe], color=COLOURS[run.recipe])
            if run.diverged:
                ax.plot(epochs[-1:], curve[-1:], "x", color=COLOURS[run.recipe], markersize=10)
    for ax, label in zip(axes, ("squared Jacobian norm / d", "kinetic energy / d"), strict=True):
        ax.set(xlabel="epoch", ylabel=label)
        ax.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    save(figure, path, ("recipe", "epoch", "jacobian", "kinetic"), rows)
    none = last.get("unregularized", (math.nan, math.nan))
    others = [values for recipe, values in last.items() if recipe != "unregularized"]
    held = all(j < none[0] and k < none[1] for j, k in others)
    words = "; ".join(f"{LABELS[recipe]} {j:.3f} and {k:.3f}" for recipe, (j, k) in last.items())
    diverged = ", ".join(LABELS[run.recipe] for run in runs if run.diverged) or "none"
    what = f"Jacobian norm and kinetic energy in the last epoch: {words}. Runs that diverged: "
    return verdict(held, f"{what}{diverged}.")


@torch.no_grad()
def plot_figure_5(runs: list[Job], path: Path) -> str:
    """Samples with and without the penalties, from the same z."""
    names = list(dict.fromkeys(run.data for run in runs))
    figure, axes = make_panels(len(names), 2, (5, 5.2))
    rows, words = [], []
    for run in runs:
        data, flow = load(run)
        like = next(flow.parameters())
        z = torch.randn(64, flow.d, device=like.device, dtype=like.dtype)
        frames, nfe = flow.solve_inverse(z)
        ax = axes[names.index(run.data)][0 if run.recipe == "ffjord" else 1]
        ax.imshow(image_grid(data.transform.inverse(frames[-1]).float().cpu()))
        ax.axis("off")
        ax.set_title(f"{run.data}, {LABELS[run.recipe]}")
        bits = run.test("bits_per_dim")
        rows.append((run.data, run.recipe, bits, nfe))
        words.append(f"{run.data}, {LABELS[run.recipe]}: {bits:.4f} bits/dim, {nfe} NFE")
    save(figure, path, ("data", "recipe", "test bits/dim", "sampling NFE"), rows)
    claim = "The paper claims equal quality, which you must judge by eye"
    return f"{claim}. {'; '.join(words)}."


def plot_table_1(runs: list[Job], path: Path) -> str:
    """bits/dim, training time, its ratio to FFJORD's and NFE; means and extremes over the seeds."""
    header = ["data", "flow", "test bits/dim", "training seconds", "FFJORD's time / this"]
    header += ["to FFJORD's likelihood", "NFE training", "NFE test", "source"]
    rows, words, held = [], [], True
    for data in dict.fromkeys(run.data for run in runs):
        members = [run for run in runs if run.data == data]
        ratios = speed_ups(members)
        rows += [
            (data, LABELS[recipe], *table_row(recipe, members, ratios), "")
            for recipe in dict.fromkeys(run.recipe for run in members)
        ]
        candidates = [
            (min(ratios[recipe]), recipe) for recipe in BOTH_PENALTIES if recipe in ratios
        ]
        least, best = max(candidates, default=(0.0, ""))
        held &= least >= RATIO
        if best:
            count = sum(ratio >= RATIO for ratio in ratios[best])
            times = f"{RATIO} times or more at {count} of {len(ratios[best])} seeds"
            words.append(f"on {data} {LABELS[best]} {sooner(ratios[best])}, {times}")
    for data, published in PUBLISHED.items():
        for name, (bits, paper) in published.items():
            ratio = str(RATIO) if name == "RNODE" else ""
            source = f"{paper}, arXiv:{ARXIV[paper]}"
            rows.append((data, f"{name} (published)", f"{bits:.2f}", "", ratio, "", "", "", source))
    figure, ((ax,),) = make_panels(1, 1, (12, 0.3 * len(rows) + 0.6))
    ax.axis("off")
    table = ax.table(rows, colLabels=header, loc="center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(range(len(header)))
    table.scale(1, 1.5)
    save(figure, path, header, rows)
    return verdict(held, f"{'; '.join(words)} (the paper reports {RATIO} times).")


def table_row(recipe: str, runs: list[Job], ratios: dict[str, list[float]]) -> list[str]:
    """Return the cells of a recipe; `runs` on a data set have the speed-ups `ratios`."""
    finished = [run for run in runs if run.recipe == recipe and run.finished]
    if not finished:
        return ["diverged", *[""] * 5]
    ffjord = {run.seed: run.seconds[-1] for run in runs if run.recipe == "ffjord" and run.finished}
    times = [ffjord[run.seed] / run.seconds[-1] for run in finished if run.seed in ffjord]
    bits = [run.test("bits_per_dim") for run in finished]
    return [
        mean_and_extremes(bits, ".4f"),
        f"{statistics.fmean(run.seconds[-1] for run in finished):.0f}",
        spread(times),
        "1" if recipe == "ffjord" else spread(ratios.get(recipe, [])),
        f"{statistics.fmean(run.values('train/nfe_forward')[-1] for run in finished):.0f}",
        f"{statistics.fmean(run.test('nfe_forward') for run in finished):.0f}",
    ]


PLOTS: dict[str, Callable[[list[Job], Path], str]] = {
    "figure1": plot_figure_1,
    "figure2": plot_figure_2,
    "figure3": plot_figure_3,
    "figure4": plot_figure_4,
    "figure5": plot_figure_5,
    "table1": plot_table_1,
}
