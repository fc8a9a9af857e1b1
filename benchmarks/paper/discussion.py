"""Section 9: do the penalties help a neural ODE that classifies?"""

import csv
import functools
import itertools
import statistics
from pathlib import Path

import torch
from rnode.paper.classifier import MEASURES, Classifier, measure, train
from rnode.paper.figures import COLOURS, make_panels, mean_and_extremes, save, verdict

from rnode import Method, Solver
from rnode.data.images import digits, named_images
from rnode.data.splits import SPLIT_NAMES, Splits
from rnode.training.plots import plot_band
from rnode.training.run_folder import whole_file

DOPRI5 = Method("dopri5")
RECIPES = {  # how it trains, and λ_K = λ_J
    "ffjord": ("no penalty (dopri5)", DOPRI5, 0.0),
    "rnode_adaptive": ("both penalties (dopri5)", DOPRI5, 0.1),
    "rnode": ("both penalties (rk4, step 0.25)", Method("rk4"), 0.1),
}
EPOCHS = {"digits": 6, "fashion14": 4}
SEEDS, WIDTH, LAYERS, BATCH = 3, 16, 3, 64
IMAGES = 3200, 1000, 1000  # of FashionMNIST for training, validation and test
SAME = 0.01  # accuracy within which two classifiers count as equal


def classify(splits: Splits, levels: int, recipe: str, seed: int, epochs: int) -> list[dict]:
    """Train a classifier; return its validation after each epoch, and the test as the last row."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_data, val, test = (
        ((x / (levels - 1)).to(device), label.argmax(1).to(device))
        for x, label in zip((splits.train, splits.val, splits.test), splits.c.values(), strict=True)
    )
    _, method, penalty = RECIPES[recipe]
    model = Classifier(10, Solver(method, DOPRI5), WIDTH, LAYERS).to(device)
    curve = train(model, train_data, val, penalty, epochs, BATCH)
    return [*curve, measure(model, test, 500) | {"seconds": curve[-1]["seconds"]}]


@functools.cache
def load_splits(data: str, root: str) -> tuple[Splits, int]:
    """Return images with labels, and the number of their grey levels."""
    if data == "digits":
        return digits(validation=180, test=360, context="label"), 17
    splits = named_images("FashionMNIST", root, 14, validation=10000, context="label")
    for name, count in zip(SPLIT_NAMES, IMAGES, strict=True):
        setattr(splits, name, getattr(splits, name)[:count])
        splits.c[name] = splits.c[name][:count]
    return splits, 256


def reproduce(path: Path, root: str) -> str:
    """Train what has not finished, plot accuracy and NFE against time, and return a verdict."""
    curves = {}
    for data, seed, recipe in itertools.product(EPOCHS, range(SEEDS), RECIPES):
        file = path.parent / "classifiers" / f"{data}_{recipe}_{seed}.csv"
        if not file.exists():
            curve = classify(*load_splits(data, root), recipe, seed, EPOCHS[data])
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file, "w") as opened:  # a run that was killed has no file
                writer = csv.DictWriter(opened, curve[0])
                writer.writeheader()
                writer.writerows(curve)
        with open(file, encoding="utf-8", newline="") as opened:
            rows = [{key: float(v) for key, v in row.items()} for row in csv.DictReader(opened)]
        curves[data, recipe, seed] = rows
        last = ", ".join(f"{MEASURES[key]} {rows[-1][key]:.4g}" for key in ("accuracy", "nfe"))
        print(f"{data}, {RECIPES[recipe][0]}, seed {seed}: {last}, {rows[-1]['seconds']:.0f} s")
    return plot(curves, path)


def plot(curves: dict[tuple[str, str, int], list[dict[str, float]]], path: Path) -> str:
    """Plot the curves, write the table of the tests, and return the verdict."""
    names = list(dict.fromkeys(data for data, _, _ in curves))
    figure, axes = make_panels(2, len(names), (5.5, 3.5))
    table, words, held = [], [], True
    for column, data in zip(axes.T, names, strict=True):
        members = {r: [c for key, c in curves.items() if key[:2] == (data, r)] for r in RECIPES}
        for recipe, seeds in members.items():
            for ax, key in zip(column, ("accuracy", "nfe"), strict=True):
                lines = [[[row[k] for row in c[:-1]] for k in ("seconds", key)] for c in seeds]
                plot_band(ax, lines, label=RECIPES[recipe][0], color=COLOURS[recipe])
                ax.set(ylabel=f"validation {MEASURES[key]}")
            cells = [mean_and_extremes([c[-1][key] for c in seeds], ".4g") for key in MEASURES]
            seconds = mean_and_extremes([c[-1]["seconds"] for c in seeds], ".3g")
            table.append((data, RECIPES[recipe][0], *cells, seconds))
        column[0].set(title=data)
        column[1].set(xlabel="seconds of training")
        ours, theirs = (
            {key: [c[-1][key] for c in members[recipe]] for key in (*MEASURES, "seconds")}
            for recipe in ("rnode", "ffjord")
        )
        ratio = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        loss = statistics.fmean(theirs["accuracy"]) - statistics.fmean(ours["accuracy"])
        held &= min(ratio) > 1 and loss < SAME and max(ours["nfe"]) < min(theirs["nfe"])
        times = mean_and_extremes(ratio, ".2f")
        words.append(
            f"on {data} the penalties and rk4 train {times} times as fast; "
            f"the test accuracy changes by {-loss:+.3f}, and NFE is "
            f"{statistics.fmean(ours['nfe']):.0f} instead of {statistics.fmean(theirs['nfe']):.0f}"
        )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    header = ("data", "classifier", *(f"test {name}" for name in MEASURES.values()), "seconds")
    save(figure, path, header, table)
    belief = verdict(held, f"{'; '.join(words)}.")
    return belief.replace("claim", "belief that the penalties help classifiers")
