"""Whole runs of the command line on the same data: wall time and likelihood, side by side with the plain recipe.

python benchmarks/runs.py [--dataset digits] [--seeds 3] [--overrides trainer.max_epochs=4 …] [--quick]

The plain recipe runs in the same program: only the pieces' solve is replaced (benchmarks/plain.py). Runs are interleaved,
seed by seed. The table has the mean over the seeds of the wall time of the whole process, of the training time an epoch,
and of bits/dim, with the largest difference in validation bits/dim from the plain recipe's run of the same seed. Written to
outputs/benchmarks/runs_….csv and .png as well.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ["model._target_=plain.multiscale", "solver=rk4", "solver.test.first_step=0.01", "trainer.inference_mode=false"]
CONTENDERS = {
    "plain recipe": PLAIN,
    "default": [],
    "bf16": ["trainer.precision=bf16-mixed"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--overrides", nargs="*", default=[], help="for every run")
    parser.add_argument("--quick", action="store_true", help="one seed, a few training steps")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.overrides = 1, ["trainer.max_steps=4", "trainer.limit_test_batches=1", *options.overrides]

    runs = {name: [] for name in CONTENDERS}
    for seed in range(options.seeds):
        for name, overrides in CONTENDERS.items():
            runs[name].append(run([f"dataset={options.dataset}", f"seed={seed}", *overrides, *options.overrides]))
            print(f"{name}, seed {seed}: {runs[name][-1]}", flush=True)

    rows = []
    for name, measured in runs.items():
        mean = {key: statistics.mean(r[key] for r in measured) for key in measured[0]}
        apart = max(abs(r["val"] - plain["val"]) for r, plain in zip(measured, runs["plain recipe"], strict=True))
        ratios = [plain["seconds"] / r["seconds"] for r, plain in zip(measured, runs["plain recipe"], strict=True)]
        rows.append(
            {
                "contender": name,
                "seconds": f"{mean['seconds']:.1f}",
                "ratio": f"{statistics.mean(ratios):.2f}",
                "seconds an epoch": f"{mean['epoch']:.1f}",
                "validation bits/dim": f"{mean['val']:.4f}",
                "apart at most": f"{apart:.4f}",
                "test bits/dim": f"{mean['test']:.4f}",
            }
        )
    report(f"runs_{options.dataset}", f"whole runs, {options.dataset}, mean of {options.seeds} seed(s)", rows)


def run(overrides: list[str]) -> dict[str, float]:
    """Wall seconds of the process, seconds of its last epoch's training, best validation and test bits/dim."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["wandb.mode=disabled", "trainer.enable_progress_bar=false", f"hydra.run.dir={folder}"]
        start = time.perf_counter()
        command = [sys.executable, ROOT / "src/train.py", *quiet, *overrides]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        with open(Path(folder) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))

    def column(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row.get(key)]

    epochs = column("train/seconds_per_epoch")
    return {
        "seconds": seconds,
        "epoch": epochs[-1] if epochs else 0.0,
        "val": min(column("val/bits_per_dim")),
        "test": column("test/bits_per_dim")[-1],
    }


if __name__ == "__main__":
    main()
