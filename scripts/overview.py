"""Make assets/overview.png: samples of a run beside bits/dim against training time.

rnode train hydra.run.dir=outputs/overview
rnode reproduce figure=2
python scripts/overview.py outputs/overview outputs/reproduce/small
"""

import statistics
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from rnode.paper.figures import COLOURS
from rnode.paper.runs import FIGURES, LABELS


def main(run: Path, reproduction: Path) -> None:
    runs = FIGURES["figure2"].runs("small", reproduction / "runs")
    time = {(r.recipe, r.seed): r.seconds[-1] for r in runs}
    factors = [time["ffjord", s] / time["fast", s] for r, s in time if r == "fast"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.2), width_ratios=(1.9, 1), layout="constrained"
    )
    left.imshow(plt.imread(run / "samples.png"))
    left.axis("off")
    for recipe in ("ffjord", "fast"):
        curves = [(r.seconds, r.by_epoch("val/bits_per_dim")) for r in runs if r.recipe == recipe]
        grid = np.linspace(max(s[0] for s, _ in curves), min(s[-1] for s, _ in curves), 200)
        bits = np.stack([np.interp(grid, *curve) for curve in curves])
        right.plot(grid, bits.mean(0), label=LABELS[recipe], color=COLOURS[recipe])
        right.fill_between(grid, bits.min(0), bits.max(0), alpha=0.25, color=COLOURS[recipe])
    mean = statistics.fmean(factors)
    right.set(xlabel="seconds of training", ylabel="validation bits/dim")
    right.set_title(f"the same steps {mean:.1f} times faster")
    right.legend()
    figure.savefig("assets/overview.png", dpi=110)
    print(f"{mean:.2f} times faster ({min(factors):.2f} – {max(factors):.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
