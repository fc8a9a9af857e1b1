"""What the paper shows, as runs of train.py and what is drawn from them: Figures 1 to 5 and Table 1."""

import csv
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import matplotlib

from rnode.metrics import read_metrics
from sweep import DIVERGED, read_result

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DATA = {  # how train.py is told of each data set; digits and fashion14 are what two cores can do
    "line": ["dataset=toy", "dataset.name=two_gaussians", "dataset.shape=[1]", "trainer.max_epochs=10"],
    "digits": [
        "dataset=digits",
        "model.pieces=1",
        "model.hidden=16",
        "warmup_steps=20",
        "trainer.max_epochs=8",
        "trainer.log_every_n_steps=1",
    ],
    "fashion14": [
        "dataset=fashion_mnist",
        "dataset.resize=14",
        "dataset.batch_size=32",
        "model.pieces=1",
        "model.hidden=16",
        "optimizer.lr=4e-3",
        "warmup_steps=20",
        "trainer.max_epochs=6",
        "trainer.log_every_n_steps=1",
        "trainer.limit_train_batches=25",
        "trainer.limit_val_batches=5",
        "trainer.limit_test_batches=10",
    ],
    "mnist": ["dataset=mnist"],
    "cifar10": ["dataset=cifar10"],
}
DOWNLOADED = ("fashion14", "mnist", "cifar10")
LABELS = {
    "ffjord": "FFJORD (dopri5)",
    "rnode_adaptive": "RNODE (dopri5)",
    "rnode": "RNODE (rk4, step 0.25)",
    "kinetic": "kinetic energy alone (rk4)",
    "jacobian": "Jacobian norm alone (rk4)",
    "unregularized": "no penalty (rk4)",
    "fast": "RNODE, our default (auto)",
}
PUBLISHED = {  # bits/dim of Table 1 in Finlay et al. (2020) and, as first reported, in Grathwohl et al. (2019)
    "mnist": {"RNODE": 0.97, "FFJORD as first reported": 0.99},
    "cifar10": {"RNODE": 3.38, "FFJORD as first reported": 3.40},
}
RATIO = 2.8  # by which RNODE trains faster than FFJORD in the paper (section 7)
BOTH_PENALTIES = ("rnode_adaptive", "rnode", "fast")
SAME = 0.02  # bits/dim within which two likelihoods count as the same at these sizes
COLOURS = dict(zip(LABELS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))


@dataclass(frozen=True)
class Run:
    """One run of train.py, as its folder has it."""

    data: str
    recipe: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        return read_metrics(self.folder / "metrics.csv")

    @property
    def finished(self) -> bool:
        return read_result(self.folder) is not None

    @property
    def diverged(self) -> bool:
        return not self.finished and (self.folder / DIVERGED).exists()

    @property
    def over(self) -> bool:
        return self.finished or self.diverged

    def values(self, key: str) -> list[float]:
        return [float(row[key]) for row in self.rows if key in row]

    def test(self, key: str) -> float:
        return self.values(f"test/{key}")[-1]

    def by_epoch(self, key: str) -> list[float]:
        """The mean of a metric over each epoch."""
        rows = [row for row in self.rows if key in row]
        groups = itertools.groupby(rows, lambda row: row["epoch"])
        return [statistics.fmean(float(row[key]) for row in group) for _, group in groups]

    @property
    def seconds(self) -> list[float]:
        """Time spent on training batches up to the end of each epoch: validation, the same for all, does not count."""
        return list(itertools.accumulate(self.by_epoch("train/seconds_per_epoch")))

    def seconds_to(self, bits: float) -> float | None:
        """When the validation bits/dim first fell to `bits`, between two epochs by interpolation; None if never."""
        before = None
        for seconds, now in zip(self.seconds, self.by_epoch("val/bits_per_dim"), strict=False):
            if now <= bits:
                if before is None:
                    return seconds
                share = (before[1] - bits) / (before[1] - now)
                return before[0] + share * (seconds - before[0])
            before = seconds, now
        return None


class Figure(NamedTuple):
    """What is run, by scale, and what is made of the runs that are over: a picture and a CSV at `path`, and a verdict."""

    data: dict[str, tuple[str, ...]]
    recipes: tuple[str, ...]
    seeds: int
    draw: Callable[[list[Run], Path], str]

    def runs(self, scale: str, folder: Path) -> list[Run]:
        combinations = itertools.product(self.data[scale], range(self.seeds), self.recipes)
        return [
            Run(data, recipe, seed, overrides(scale, data, recipe), folder / f"{data}_{recipe}_{seed}")
            for data, seed, recipe in combinations
        ]


def overrides(scale: str, data: str, recipe: str) -> tuple[str, ...]:
    """What of a recipe depends on the data or the scale."""
    found = []
    if data == "cifar10" and recipe in ("rnode", "rnode_adaptive", "jacobian", "fast"):
        found.append("reg.lambda_j=0.03")  # section 6
    if scale == "paper" and data != "line" and recipe != "fast":
        found += ["solver.gradient=adjoint", "solver.train.first_step=1e-2"]
    return tuple(found)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{value:.5g}" if isinstance(value, float) else value for value in row] for row in rows)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)


def verdict(held: bool, what: str) -> str:
    return f"The paper's claim {'held' if held else 'did not hold'} here: {what}"


def load(run: Run):
    """Data and flow of a finished run, as they were tested."""
    import torch

    from build import load_flow

    torch.manual_seed(0)
    data, flow = load_flow(str(run.folder / "best.ckpt"))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return data, flow.to(accelerator)


def figure_1(runs: list[Run], path: Path) -> str:
    """Trajectories of a flow on the line, with and without the penalties."""
    import torch

    from rnode.evaluation import evaluate

    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 5), layout="constrained", sharey=True, squeeze=False)
    rows, worth = [], {}
    for ax, run in zip(axes[0], runs, strict=True):
        data, flow = load(run)
        data.setup()
        summary, _ = evaluate(flow, data, "test", 1, 0)
        worth[run.recipe] = summary
        with torch.no_grad():
            z = torch.linspace(-2.5, 2.5, 41)[:, None].to(next(flow.parameters()))
            frames = flow.trajectory(z, 64)[..., 0].cpu()  # from T to 0
            x = torch.linspace(-4, 4, 400)[:, None]
            density = flow.log_prob(x.to(z)).exp().cpu()
        time = torch.linspace(len(flow.pieces), 0, len(frames))
        ax.plot(time, frames, color=COLOURS[run.recipe], linewidth=0.8)
        ax.plot(-0.5 * density, x[:, 0], color="0.3")
        ax.plot(time[0] + 0.5 * torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5, x[:, 0], color="0.3")
        ax.set(xlabel="t", ylabel="z(t)", title=LABELS[run.recipe])
        for number, path_of_one in enumerate(frames.T.tolist()):
            rows += [(run.recipe, number, t, v) for t, v in zip(time.tolist(), path_of_one, strict=True)]
    save(figure, path)
    write_csv(path, ("recipe", "trajectory", "t", "z"), rows)
    if len(worth) < 2:
        return "One of the two runs is missing."
    ours, theirs = worth["rnode_adaptive"], worth["ffjord"]
    difference = ours["bits_per_dim"] - theirs["bits_per_dim"]
    held = abs(difference) < SAME and ours["straightness"] < theirs["straightness"]
    return verdict(
        held,
        f"likelihoods differ by {difference:+.4f} bits; with the penalties the share of speed that is not straight is "
        f"{ours['straightness']:.3f}, without {theirs['straightness']:.3f}; kinetic energy {ours['kinetic']:.3f} and "
        f"{theirs['kinetic']:.3f}, NFE {ours['nfe']:.0f} and {theirs['nfe']:.0f}.",
    )


def figure_2(runs: list[Run], path: Path) -> str:
    """Validation bits/dim against training time, the band from the lowest to the highest seed."""
    import numpy as np

    names = list(dict.fromkeys(run.data for run in runs))
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4.5), layout="constrained", squeeze=False)
    rows, words, held = [], [], True
    for ax, data in zip(axes[0], names, strict=True):
        for recipe in ("ffjord", "rnode", "fast"):
            members = [run for run in runs if (run.data, run.recipe) == (data, recipe) and run.finished]
            if not members:
                continue
            curves = [(run.seconds, run.by_epoch("val/bits_per_dim")) for run in members]
            time = np.linspace(max(s[0] for s, _ in curves), min(s[-1] for s, _ in curves), 200)
            bits = np.stack([np.interp(time, s, b[: len(s)]) for s, b in curves])
            ax.plot(time, bits.mean(0), label=LABELS[recipe], color=COLOURS[recipe])
            ax.fill_between(time, bits.min(0), bits.max(0), alpha=0.25, color=COLOURS[recipe])
            for run, (s, b) in zip(members, curves, strict=True):
                rows += [(data, recipe, run.seed, epoch, *pair) for epoch, pair in enumerate(zip(s, b, strict=False))]
        ratios = sooner([run for run in runs if run.data == data])
        for recipe, values in ratios.items():
            words.append(f"{data}: {LABELS[recipe]} at FFJORD's likelihood {spread(values)} times sooner than FFJORD")
        held &= any(min(values) >= 1 for values in ratios.values())
        low = min((row[5] for row in rows if row[0] == data), default=0.0)
        ax.set(xlabel="seconds of training", ylabel="validation bits/dim", title=data, ylim=(low - 0.05, low + 1.2))
        ax.legend()
    save(figure, path)
    write_csv(path, ("data", "recipe", "seed", "epoch", "seconds", "val bits/dim"), rows)
    return verdict(held, "; ".join(words) + ".")


def sooner(runs: list[Run]) -> dict[str, list[float]]:
    """For each recipe but FFJORD, by seed: FFJORD's time to its own best validation bits/dim + 0.01, over this one's.

    0 where it was never reached.
    """
    baseline = {run.seed: run for run in runs if run.recipe == "ffjord" and run.finished}
    ratios: dict[str, list[float]] = {}
    for run in runs:
        if run.recipe != "ffjord" and run.seed in baseline:
            theirs = baseline[run.seed]
            target = min(theirs.by_epoch("val/bits_per_dim")) + 0.01
            ours = run.seconds_to(target)
            ratios.setdefault(run.recipe, []).append(0.0 if ours is None else theirs.seconds_to(target) / ours)
    return ratios


def spread(ratios: list[float]) -> str:
    """Mean, least and largest of the ratios over seeds; 0 stands for never."""
    if not ratios:
        return "–"
    if missed := ratios.count(0.0):
        return f"not reached by {missed} of {len(ratios)}"
    range_of = f" ({min(ratios):.2f} – {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.fmean(ratios):.2f}{range_of}"


def figure_3(runs: list[Run], path: Path) -> str:
    """NFE of the adaptive solver against the Jacobian norm while vanilla FFJORD trains."""
    from scipy.stats import spearmanr

    run = runs[0]
    pairs = [
        (int(row["step"]), float(row["train/jacobian"]), float(row["train/nfe_forward"]))
        for row in run.rows
        if "train/jacobian" in row and "train/nfe_forward" in row
    ]
    steps, jacobian, nfe = zip(*pairs, strict=True)
    correlation, p = spearmanr(jacobian, nfe)
    figure, ax = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
    points = ax.scatter(jacobian, nfe, c=steps, s=14)
    figure.colorbar(points, label="training step")
    ax.set(xlabel="squared Jacobian norm / d", ylabel="NFE (forward)", title=f"{run.data}, {LABELS[run.recipe]}")
    save(figure, path)
    write_csv(path, ("step", "jacobian", "nfe"), pairs)
    held = correlation > 0 and p < 0.01
    return verdict(held, f"rank correlation {correlation:.2f} (p = {p:.1g}) over {len(pairs)} training steps.")


def figure_4(runs: list[Run], path: Path) -> str:
    """The ablation under the fixed grid. A run that diverged ends in a cross."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows, last = [], {}
    for run in runs:
        curves = [run.by_epoch(f"train/{key}") for key in ("jacobian", "kinetic")]
        last[run.recipe] = [curve[-1] if curve else float("nan") for curve in curves]
        rows += [(run.recipe, epoch, *pair) for epoch, pair in enumerate(zip(*curves, strict=True), 1)]
        for ax, curve in zip(axes, curves, strict=True):
            epochs = range(1, len(curve) + 1)
            ax.plot(epochs, curve, label=LABELS[run.recipe], color=COLOURS[run.recipe])
            if run.diverged:
                ax.plot(epochs[-1:], curve[-1:], "x", color=COLOURS[run.recipe], markersize=10)
    for ax, label in zip(axes, ("squared Jacobian norm / d", "kinetic energy / d"), strict=True):
        ax.set(xlabel="epoch", ylabel=label, yscale="log")
    axes[0].legend()
    save(figure, path)
    write_csv(path, ("recipe", "epoch", "jacobian", "kinetic"), rows)
    ended = [LABELS[run.recipe] for run in runs if run.diverged]
    none = last.get("unregularized")
    others = {recipe: values for recipe, values in last.items() if recipe != "unregularized"}
    held = none is not None and all(j < none[0] and k < none[1] for j, k in others.values())
    figures = "; ".join(f"{LABELS[recipe]} {j:.3f} and {k:.3f}" for recipe, (j, k) in last.items())
    failed = f"; ended early: {', '.join(ended)}" if ended else "; no run became unstable"
    return verdict(held, f"Jacobian norm and kinetic energy in the last epoch: {figures}{failed}.")


def figure_5(runs: list[Run], path: Path) -> str:
    """Samples with and without the penalties, from the same z."""
    import torch

    from rnode.pictures import draw

    names = list(dict.fromkeys(run.data for run in runs))
    figure, axes = plt.subplots(len(names), 2, figsize=(10, 5.2 * len(names)), layout="constrained", squeeze=False)
    rows, words = [], []
    for run in runs:
        data, flow = load(run)
        with torch.no_grad():
            drawn = data.inverse(flow.sample(64)).float().cpu()
        ax = axes[names.index(run.data)][0 if run.recipe == "ffjord" else 1]
        draw(ax, drawn)
        ax.set_title(f"{run.data}, {LABELS[run.recipe]}")
        rows.append((run.data, run.recipe, run.test("bits_per_dim"), flow.nfe_inverse))
        words.append(f"{run.data}, {LABELS[run.recipe]}: {run.test('bits_per_dim'):.4f} bits/dim, {flow.nfe_inverse} NFE")
    save(figure, path)
    write_csv(path, ("data", "recipe", "test bits/dim", "sampling NFE"), rows)
    return "The paper's claim, no difference in quality, is for the eye to judge. " + "; ".join(words) + "."


def table_1(runs: list[Run], path: Path) -> str:
    """bits/dim, training time, its ratio to FFJORD's, NFE: means over the seeds, the spread beside them."""
    header = (
        "data",
        "flow",
        "test bits/dim",
        "training seconds",
        "FFJORD's time / this",
        "to FFJORD's likelihood",
        "NFE training",
        "NFE test",
    )
    rows, words, held = [], [], True
    for data in dict.fromkeys(run.data for run in runs):
        members = [run for run in runs if run.data == data]
        ratios = sooner(members)
        baseline = {run.seed: run for run in members if run.recipe == "ffjord" and run.finished}
        for recipe in dict.fromkeys(run.recipe for run in members):
            finished = [run for run in members if run.recipe == recipe and run.finished]
            if not finished:
                rows.append((data, LABELS[recipe], "diverged", *[""] * 5))
                continue
            times = [baseline[r.seed].seconds[-1] / r.seconds[-1] for r in finished if r.seed in baseline]
            rows.append(
                (
                    data,
                    LABELS[recipe],
                    spread_of([run.test("bits_per_dim") for run in finished]),
                    f"{statistics.fmean(run.seconds[-1] for run in finished):.0f}",
                    spread(times),
                    "1" if recipe == "ffjord" else spread(ratios.get(recipe, [])),
                    f"{statistics.fmean(run.values('train/nfe_forward')[-1] for run in finished):.0f}",
                    f"{statistics.fmean(run.test('nfe_forward') for run in finished):.0f}",
                )
            )
        candidates = [(min(ratios[recipe]), recipe) for recipe in BOTH_PENALTIES if recipe in ratios]
        least, best = max(candidates, default=(0.0, None))
        held &= least >= RATIO
        if best is not None:
            share = sum(ratio >= RATIO for ratio in ratios[best])
            times = f"{spread(ratios[best])} times sooner, {RATIO} or more at {share} of {len(ratios[best])} seeds"
            words.append(f"on {data} {LABELS[best]} reached FFJORD's validation bits/dim {times}")
    for data, published in PUBLISHED.items():
        for name, bits in published.items():
            rows.append((data, f"{name} (published)", f"{bits}", "", f"{RATIO}" if name == "RNODE" else "", "", "", ""))
    write_csv(path, header, rows)
    figure, ax = plt.subplots(figsize=(12, 0.3 * len(rows) + 0.6), layout="constrained")
    ax.axis("off")
    table = ax.table([[str(v) for v in row] for row in rows], colLabels=header, loc="center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(range(len(header)))
    table.scale(1, 1.5)
    save(figure, path)
    return verdict(held, f"{'; '.join(words)} ({RATIO} in the paper).")


def spread_of(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


LINE = {"small": ("line",), "paper": ("line",)}
BOTH = {"small": ("digits",), "paper": ("mnist", "cifar10")}
KNOWN = {
    "figure1": Figure(LINE, ("ffjord", "rnode_adaptive"), 1, figure_1),
    "figure2": Figure(BOTH, ("ffjord", "rnode", "fast"), 3, figure_2),
    "figure3": Figure({"small": ("digits",), "paper": ("cifar10",)}, ("ffjord",), 1, figure_3),
    "figure4": Figure(
        {"small": ("digits",), "paper": ("mnist",)}, ("unregularized", "kinetic", "jacobian", "rnode"), 1, figure_4
    ),
    "figure5": Figure(BOTH, ("ffjord", "rnode"), 1, figure_5),
    "table1": Figure(
        {"small": ("digits", "fashion14"), "paper": ("mnist", "cifar10")},
        ("ffjord", "rnode_adaptive", "rnode", "kinetic", "jacobian", "fast"),
        3,
        table_1,
    ),
}
SCALES = ("small", "paper")
