"""This program beside three other libraries: held-out nats after equal training time.

pip install -e '.[bench]'
python benchmarks/peers.py [--seconds 60] [--seeds 0 1 2] [--quick]
                           [--datasets eight_gaussians checkerboard moons digits]

benchmarks/contenders.py says what the contenders are. All networks are 64 wide, on digits 256
(for Glow 64, which makes as many weights as RNODE has). Batches are of 512 samples, or 256 images.
The clock counts training steps alone. Of each curve the table has the point of the lowest
validation, with its nats on test data. The record is benchmarks/results/peers.json, and the plot
outputs/benchmarks/peers.png (validation against seconds, of the first seed).
"""

import argparse
import math

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor

from common import OUTPUTS, mean_and_spread, write_record
from contenders import Sample, best, glow, ot_cfm, rnode_flow, train, zuko_cnf
from rnode import ImageTransform
from rnode.app.processes import prepare_process
from rnode.data.densities import DENSITIES
from rnode.training.plots import save_figure

DATASETS = ["eight_gaussians", "checkerboard", "moons", "digits"]
ENTROPY = {"eight_gaussians": 0.985, "checkerboard": math.log(8)}
CONTENDERS = {
    "RNODE": rnode_flow,
    "OT-CFM (torchcfm)": ot_cfm,
    "CNF (zuko)": zuko_cnf,
    "Glow (normflows)": glow,
}
OF_IMAGES = ("Glow (normflows)",)
WIDTHS = {"RNODE": 256, "OT-CFM (torchcfm)": 256, "CNF (zuko)": 256, "Glow (normflows)": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--quick", action="store_true", help="8 seconds each")
    options = parser.parse_args()
    seconds = 8 if options.quick else options.seconds
    prepare_process()

    rows, curves = [], []
    for dataset in options.datasets:
        entropy = f"{ENTROPY[dataset]:.3f}" if dataset in ENTROPY else ""
        row = {"dataset": dataset, "entropy": entropy}
        for name, contender in CONTENDERS.items():
            if name in OF_IMAGES and dataset != "digits":
                row[name] = ""
                continue
            width, found = WIDTHS[name] if dataset == "digits" else 64, []
            for seed in options.seeds:
                torch.manual_seed(seed)
                sample, validation, test = data(dataset)
                curve = train(*contender(test.shape[1], sample, width), validation, test, seconds)
                point = {"dataset": dataset, "contender": name, "seed": seed}
                curves += [point | part._asdict() for part in curve]
                found.append(best(curve).test)
            row[name] = mean_and_spread(found, 3)
            print(f"{dataset}, {name}: {row[name]} nats", flush=True)
        rows.append(row)
    plot(curves)
    title = f"test nats within {seconds:.0f} s of training, at the best validation"
    write_record("peers", title, rows)


def data(name: str) -> tuple[Sample, Tensor, Tensor]:
    """A function that samples a training batch, the validation set and the test set."""
    if name != "digits":
        rng, density = np.random.default_rng(0), DENSITIES[name]
        held_out = (density(2000, np.random.default_rng(seed)) for seed in (1, 2))
        validation, test = (torch.from_numpy(points).float() for points in held_out)
        return lambda: torch.from_numpy(density(512, rng)).float(), validation, test
    images = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    transform = ImageTransform(levels=17, alpha=1e-5)

    def transformed(index: Tensor) -> Tensor:
        return transform(images[index], index, torch.empty(len(index), 0)).y

    validation, test = (transformed(index) for index in torch.arange(360).split(180))
    return lambda: transformed(torch.randint(360, len(images), (256,))), validation, test


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
            seconds, nats = ([p[key] for p in points] for key in ("seconds", "validation"))
            ax.plot(seconds, nats, "o-", markersize=3, label=name)
        if dataset in ENTROPY:
            ax.axhline(ENTROPY[dataset], color="gray", linestyle=":", label="entropy")
        ax.set(title=dataset, xlabel="seconds of training", ylabel="validation nats")
        ax.set_yscale("log")
    shown = {}
    for ax in axes[0]:
        handles, labels = ax.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=len(shown))
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    save_figure(figure, OUTPUTS / "peers.png")


if __name__ == "__main__":
    main()
