"""This program beside three other libraries: held-out likelihood after equal training time.

pip install -e '.[bench]'
python benchmarks/peers.py [--seconds 60] [--seeds 0 1 2] [--quick]
                           [--datasets eight_gaussians checkerboard moons digits fashion_mnist]
                           [--root DIR] [--cells FILE]

benchmarks/contenders.py says what the contenders are; `RNODE, base=auto` is `rnode.fit` of POOL
points, with its closed forms. Dense networks are 64 wide for points in the plane and 256 for
images. Convolutions have 64 channels in Glow, which makes as many weights as the dense flows have,
and 32 or 16 in the multiscale flow. FashionMNIST is reduced to 14×14; its files are in DIR. Batches
have 512 points or 256 images, those of the multiscale flow 32. The clock counts training steps
alone. Of each curve the table has the point of the lowest validation, with its negative
log-likelihood of test data in nats, of images in bits/dim. The records are peers.json and
peers_images.json in benchmarks/results, and the plot outputs/benchmarks/peers.png (validation
against seconds, of the first seed). `--cells` keeps finished trainings, and a later run skips them.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import rnode
from common import OUTPUTS, as_time, kept, mean_and_spread, write_record
from contenders import (
    Point,
    Sample,
    best,
    glow,
    ot_cfm,
    rnode_flow,
    rnode_multiscale,
    train,
    zuko_cnf,
)
from rnode.app.base import END_SHARE, START_SHARE
from rnode.app.processes import prepare_process
from rnode.data.datamodule import DataModule
from rnode.data.densities import DENSITIES
from rnode.data.images import digits, named_images
from rnode.training.plots import save_figure

POINTS = ["eight_gaussians", "checkerboard", "moons"]  # in the plane
IMAGES = ["digits", "fashion_mnist"]
ENTROPY = {"eight_gaussians": 0.985, "checkerboard": math.log(8)}
POOL = 250_000  # points of rnode.fit; the others sample new ones
AUTO = "RNODE, base=auto"
CONTENDERS = {
    AUTO: None,  # see `fit`
    "RNODE, multiscale": rnode_multiscale,
    "Glow (normflows)": glow,
    "RNODE, dense": rnode_flow,
    "OT-CFM (torchcfm)": ot_cfm,
    "CNF (zuko)": zuko_cnf,
}
OF_IMAGES = ("RNODE, multiscale", "Glow (normflows)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--datasets", nargs="+", choices=POINTS + IMAGES, default=POINTS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--root", default="data", help="folder of FashionMNIST's files")
    parser.add_argument("--cells", type=Path, help="file that keeps finished trainings")
    parser.add_argument("--quick", action="store_true", help="8 seconds each")
    options = parser.parse_args()
    seconds = 8 if options.quick else options.seconds
    prepare_process()

    rows, curves = {"peers": [], "peers_images": []}, []
    for dataset in options.datasets:
        entropy = f"{ENTROPY[dataset]:.3f}" if dataset in ENTROPY else ""
        row = {"dataset": dataset, "entropy": entropy}
        for name in options.contenders:
            if name in (OF_IMAGES if dataset in POINTS else [AUTO]):
                continue
            found = []
            for seed in options.seeds:
                training = partial(run, name, dataset, seconds, options.root, seed)
                key = [dataset, name, seed, seconds]
                curve = [Point(*part) for part in kept(options.cells, key, training)]
                point = {"dataset": dataset, "contender": name, "seed": seed}
                curves += [point | part._asdict() for part in curve]
                found.append(best(curve).test)
            row[name] = mean_and_spread(found, 3)
            print(f"{dataset}, {name}: {row[name]}", flush=True)
        rows["peers" if dataset in POINTS else "peers_images"].append(row)
    for record, found in rows.items():
        if found:
            unit = "nats" if record == "peers" else "bits/dim"
            title = f"test {unit} within {seconds:.0f} s of training, at the best validation"
            write_record(record, title, found)
    plot(curves)


def run(name: str, dataset: str, seconds: float, root: str, seed: int) -> list[Point]:
    """Train a contender; its points have nats, of images bits/dim."""
    torch.manual_seed(seed)
    if name == AUTO:
        return [fit(dataset, seconds, seed)]
    contender = CONTENDERS[name]
    if dataset in POINTS:
        sample, validation, test = points(dataset)
        return train(*contender(2, sample, 64), validation, test, seconds)
    width = {"Glow (normflows)": 64, "RNODE, multiscale": 32 if dataset == "digits" else 16}
    sample, (validation, test), (log_det, test_log_det) = images(dataset, root)
    d = test.shape[1]
    curve = train(*contender(d, sample, width.get(name, 256)), validation, test, seconds)
    bits = d * math.log(2)
    return [
        Point(s, (nats - log_det) / bits, (test_nats - test_log_det) / bits)
        for s, nats, test_nats in curve
    ]


def fit(dataset: str, seconds: float, seed: int) -> Point:
    """Train as a user of a table does; a tenth of max_time goes to fits before the training."""
    training = seconds / (1 + START_SHARE + END_SHARE)
    rows = DENSITIES[dataset](POOL, np.random.default_rng(0))
    density = rnode.fit(rows, max_time=as_time(training), overrides=[f"seed={seed}"])
    return Point(seconds, *(-density.score(x.numpy()) for x in points(dataset)[1:]))


def points(name: str) -> tuple[Sample, Tensor, Tensor]:
    """A function that samples a training batch, the validation set and the test set."""
    rng, density = np.random.default_rng(0), DENSITIES[name]
    held_out = (density(2000, np.random.default_rng(seed)) for seed in (1, 2))
    validation, test = (torch.from_numpy(x).float() for x in held_out)
    return lambda: torch.from_numpy(density(512, rng)).float(), validation, test


def images(name: str, root: str) -> tuple[Sample, list[Tensor], list[float]]:
    """A function that samples a training batch, the held-out sets, and their mean log-determinants.

    The images are dequantized, in the space of logits, and flattened.
    """
    source = {"name": "FashionMNIST", "root": root, "resize": 14, "validation": 500, "test": 500}
    options = source if name == "fashion_mnist" else {}
    data = DataModule(named_images if options else digits, 256, 500, alpha=1e-5, **options)
    data.setup()
    sets = {split: len(getattr(data.splits, split)) for split in ("val", "test")}
    held_out = [
        data.transform.for_evaluation(*data.fetch(split, range(min(n, 500))), 0)
        for split, n in sets.items()
    ]

    def sample() -> Tensor:
        index = torch.randint(len(data.splits.train), (256,))
        return data.transform(*data.fetch("train", index)).y.flatten(1)

    return sample, [x.y.flatten(1) for x in held_out], [float(x.log_det.mean()) for x in held_out]


def plot(curves: list[dict]) -> None:
    datasets = list(dict.fromkeys(point["dataset"] for point in curves))
    size = (4 * len(datasets), 3.5)
    figure, axes = plt.subplots(1, len(datasets), figsize=size, layout="constrained", squeeze=False)
    for ax, dataset in zip(axes[0], datasets, strict=True):
        for name in CONTENDERS:
            points = [p for p in curves if (p["dataset"], p["contender"]) == (dataset, name)]
            points = [p for p in points if p["seed"] == points[0]["seed"]]
            if not points:
                continue
            seconds, values = ([p[key] for p in points] for key in ("seconds", "validation"))
            ax.plot(seconds, values, "o-", markersize=7 if name == AUTO else 3, label=name)
        if dataset in ENTROPY:
            ax.axhline(ENTROPY[dataset], color="gray", linestyle=":", label="entropy")
        unit = "nats" if dataset in POINTS else "bits/dim"
        ax.set(title=dataset, xlabel="seconds of training", ylabel=f"validation {unit}")
        ax.set_yscale("log")
        ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    shown = {}
    for ax in axes[0]:
        handles, labels = ax.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=3)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    save_figure(figure, OUTPUTS / "peers.png")


if __name__ == "__main__":
    main()
