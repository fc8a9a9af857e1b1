"""The runs behind Figures 1 to 5 and Table 1 of the paper, and what is read from their folders."""

import itertools
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from rnode.training.results import METRICS, read_metrics, read_status

SMALL = [
    *("model.pieces=1", "model.hidden=16", "trainer.log_every_n_steps=1"),
    *("decay=false", "warmup_steps=20"),  # then a constant rate, as in the paper
]
FULL = ["optimizer.lr=1e-3", "warmup_steps=0", "decay=false"]  # section 6
DATA = {  # overrides of `rnode train`; digits and fashion14 are sized for two CPU cores
    "line": [
        "dataset=toy",
        "dataset.name=two_gaussians",
        "trainer.max_epochs=10",
    ],
    "digits": ["dataset=digits", *SMALL, "optimizer.lr=4e-3", "trainer.max_epochs=8"],
    "fashion14": [
        "dataset=fashion_mnist",
        *SMALL,
        "dataset.resize=14",
        "dataset.batch_size=32",
        "optimizer.lr=4e-3",
        "trainer.max_epochs=6",
        "trainer.limit_train_batches=25",
        "trainer.limit_val_batches=5",
        "trainer.limit_test_batches=10",
    ],
    "mnist": ["dataset=mnist", *FULL],
    "cifar10": ["dataset=cifar10", *FULL],
}
DOWNLOADED = ("fashion14", "mnist", "cifar10")
RECIPES = {  # their overrides of `rnode train`
    "ffjord": ("solver=dopri5", "regularizer=none"),
    "rnode_adaptive": ("solver=dopri5", "regularizer=rnode"),
    "rnode": ("solver=rk4", "regularizer=rnode"),
    "kinetic": ("solver=rk4", "reg.lambda_j=0"),
    "jacobian": ("solver=rk4", "reg.lambda_k=0"),
    "unregularized": ("solver=rk4", "regularizer=none"),
    "fast": ("solver=auto", "regularizer=rnode"),
}
LABELS = {
    "ffjord": "FFJORD (dopri5)",
    "rnode_adaptive": "RNODE (dopri5)",
    "rnode": "RNODE (rk4, step 0.25)",
    "kinetic": "kinetic energy alone (rk4)",
    "jacobian": "Jacobian norm alone (rk4)",
    "unregularized": "no penalty (rk4)",
    "fast": "RNODE, our default (auto)",
}
BOTH_PENALTIES = ("rnode_adaptive", "rnode", "fast")
ARXIV = {  # of the papers that print the figures below
    "RNODE": "2002.02798",
    "FFJORD": "1810.01367",
    "Glow": "1807.03039",
    "Flow++": "1902.00275",
    "score SDE": "2011.13456",
}
PUBLISHED = {  # test bits/dim of the flows that the paper compares with, and where it is printed
    "mnist": {
        "Real NVP": (1.06, "FFJORD"),
        "Glow": (1.05, "FFJORD"),
        "FFJORD": (0.99, "FFJORD"),
        "RNODE": (0.97, "RNODE"),
    },
    "cifar10": {
        "Real NVP": (3.49, "Glow"),
        "i-ResNet": (3.45, "score SDE"),
        "Glow": (3.35, "Glow"),
        "Flow++": (3.08, "Flow++"),
        "Residual Flow": (3.28, "score SDE"),
        "FFJORD": (3.40, "FFJORD"),
        "RNODE": (3.38, "RNODE"),
    },
    "imagenet64": {
        "Real NVP": (3.98, "Glow"),
        "Glow": (3.81, "Glow"),
        "Flow++": (3.69, "Flow++"),
    },
}
RATIO = 2.8  # training time of FFJORD over that of RNODE in the paper (section 7)


@dataclass(frozen=True)
class Job:
    """A training run that a figure needs, and what its folder holds."""

    data: str
    recipe: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        return read_metrics(self.folder / METRICS)

    @property
    def finished(self) -> bool:
        return read_status(self.folder)[0] == "finished"

    @property
    def diverged(self) -> bool:
        return read_status(self.folder)[0] == "diverged"

    @property
    def ended(self) -> bool:
        return self.finished or self.diverged

    def values(self, key: str) -> list[float]:
        return [float(row[key]) for row in self.rows if key in row]

    def test(self, key: str) -> float:
        return self.values(f"test/{key}")[-1]

    def by_epoch(self, key: str) -> list[float]:
        """Return the mean of a metric over each epoch."""
        rows = (row for row in self.rows if key in row)
        epochs = itertools.groupby(rows, lambda row: row["epoch"])
        return [statistics.fmean(float(row[key]) for row in epoch) for _, epoch in epochs]

    @property
    def seconds(self) -> list[float]:
        """Time on training batches up to the end of each epoch; validation does not count."""
        return self.by_epoch("val/seconds_total")

    def seconds_to(self, bits: float) -> float | None:
        """Return when the validation bits/dim first fell to `bits`; None if they never did.

        The time between the ends of two epochs is interpolated.
        """
        before = None
        for seconds, now in zip(self.seconds, self.by_epoch("val/bits_per_dim"), strict=False):
            if now <= bits:
                if before is None:
                    return seconds
                share = (before[1] - bits) / (before[1] - now)
                return before[0] + share * (seconds - before[0])
            before = seconds, now
        return None


def speed_ups(runs: list[Job]) -> dict[str, list[float]]:
    """Return how many times sooner than FFJORD a recipe reached FFJORD's likelihood, by seed.

    The likelihood is FFJORD's least validation bits/dim + 0.01. A run that never reached it has 0.
    """
    baseline = {run.seed: run for run in runs if run.recipe == "ffjord" and run.finished}
    ratios: dict[str, list[float]] = {}
    for run in runs:
        if run.recipe != "ffjord" and run.seed in baseline:
            theirs = baseline[run.seed]
            target = min(theirs.by_epoch("val/bits_per_dim")) + 0.01
            ours = run.seconds_to(target)
            ratio = 0.0 if ours is None else theirs.seconds_to(target) / ours
            ratios.setdefault(run.recipe, []).append(ratio)
    return ratios


class Figure(NamedTuple):
    """What is run for a figure or a table: data sets by scale, recipes and the number of seeds."""

    data: dict[str, tuple[str, ...]]
    recipes: tuple[str, ...]
    seeds: int

    def runs(self, scale: str, folder: Path) -> list[Job]:
        """Return the runs at a scale, whose folders lie in `folder`."""
        combinations = itertools.product(self.data[scale], range(self.seeds), self.recipes)
        return [
            Job(
                data,
                recipe,
                seed,
                overrides(scale, data, recipe),
                folder / f"{data}_{recipe}_{seed}",
            )
            for data, seed, recipe in combinations
        ]


def overrides(scale: str, data: str, recipe: str) -> tuple[str, ...]:
    """Return the overrides of a recipe for the data and the scale."""
    found = list(RECIPES[recipe])
    if data == "line" and recipe == "ffjord":
        found.append("model._target_=rnode.paper.generic.mlp")
    if data == "cifar10" and recipe in ("rnode", "rnode_adaptive", "jacobian", "fast"):
        found.append("reg.lambda_j=0.03")  # section 6
    if scale == "paper" and data != "line" and recipe != "fast":
        found += ["experiment=paper", "solver.train.first_step=1e-2"]
    return tuple(found)


LINE = {"small": ("line",), "paper": ("line",)}
IMAGES = {"small": ("digits",), "paper": ("mnist", "cifar10")}
CIFAR10 = {"small": ("digits",), "paper": ("cifar10",)}
MNIST = {"small": ("digits",), "paper": ("mnist",)}
TABLE = {"small": ("digits", "fashion14"), "paper": ("mnist", "cifar10")}
FIGURES = {
    "figure1": Figure(LINE, ("ffjord", "rnode_adaptive"), seeds=5),
    "figure2": Figure(IMAGES, ("ffjord", "rnode", "fast"), seeds=3),
    "figure3": Figure(CIFAR10, ("ffjord",), seeds=1),
    "figure4": Figure(MNIST, ("unregularized", "kinetic", "jacobian", "rnode"), seeds=1),
    "figure5": Figure(IMAGES, ("ffjord", "rnode"), seeds=1),
    "table1": Figure(TABLE, tuple(r for r in LABELS if r != "unregularized"), seeds=3),
}
