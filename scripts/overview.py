"""Make assets/overview.png: samples of a run beside bits/dim against training time.

rnode train hydra.run.dir=outputs/overview
rnode reproduce figure=2
python scripts/overview.py outputs/overview outputs/reproduce/small
"""

import statistics
import sys
from pathlib import Path

from matplotlib import pyplot as plt
from rnode.paper.figures import plot_seeds
from rnode.paper.runs import FIGURES


def main(run: Path, reproduction: Path) -> None:
    runs = FIGURES["figure2"].runs("small", reproduction / "runs")
    time = {(r.recipe, r.seed): r.seconds[-1] for r in runs}
    factors = [time["ffjord", s] / time["fast", s] for r, s in time if r == "fast"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), width_ratios=(1.75, 1), layout="constrained"
    )
    left.imshow(plt.imread(run / "samples.png"))
    left.axis("off")
    for recipe in ("ffjord", "fast"):
        plot_seeds(right, [run for run in runs if run.recipe == recipe])
    mean = statistics.fmean(factors)
    right.set(xlabel="seconds of training", ylabel="validation bits/dim")
    right.set_title(f"the same steps {mean:.1f} times faster")
    right.legend()
    figure.savefig("assets/overview.png", dpi=110)
    print(f"{mean:.2f} times faster ({min(factors):.2f} – {max(factors):.2f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
