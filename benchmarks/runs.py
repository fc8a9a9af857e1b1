"""Whole runs of the command line: wall time and likelihood, beside the plain recipe.

python benchmarks/runs.py [--dataset digits] [--seeds 3] [--quick]
                          [--overrides trainer.max_epochs=4 …]

The plain recipe runs in the same program; only its pieces are solved otherwise
(benchmarks/plain.py). Runs are interleaved, seed by seed. The table has means over the seeds: wall
time of the whole process, training time of the last epoch and bits/dim. `largest difference` is
that of the validation bits/dim from the plain recipe with the same seed. The record is
benchmarks/results/runs_DATASET.json.
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

from common import write_record

ROOT = Path(__file__).resolve().parent.parent
PLAIN = [
    "model._target_=plain.multiscale",
    "solver=rk4",
    "solver.test.first_step=0.01",
]
CONTENDERS = {"plain recipe": PLAIN, "default": [], "bf16": ["trainer.precision=bf16-mixed"]}
QUICK = ["trainer.max_steps=4", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--overrides", nargs="*", default=[], help="overrides of every run")
    parser.add_argument("--quick", action="store_true", help="one seed, a few training steps")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.overrides = 1, [*QUICK, *options.overrides]

    runs = {name: [] for name in CONTENDERS}
    for seed in range(options.seeds):
        common = [f"dataset={options.dataset}", f"seed={seed}", *options.overrides]
        for name, overrides in CONTENDERS.items():
            runs[name].append(run([*common, *overrides]))
            print(f"{name}, seed {seed}: {runs[name][-1]}", flush=True)

    rows = []
    for name, measured in runs.items():
        mean = {key: statistics.mean(r[key] for r in measured) for key in measured[0]}
        pairs = list(zip(measured, runs["plain recipe"], strict=True))
        ratio = statistics.mean(plain["seconds"] / r["seconds"] for r, plain in pairs)
        difference = max(abs(r["val"] - plain["val"]) for r, plain in pairs)
        rows.append(
            {
                "contender": name,
                "seconds": f"{mean['seconds']:.1f}",
                "ratio": f"{ratio:.2f}",
                "seconds an epoch": f"{mean['epoch']:.1f}",
                "validation bits/dim": f"{mean['val']:.4f}",
                "largest difference": f"{difference:.4f}",
                "test bits/dim": f"{mean['test']:.4f}",
            }
        )
    title = f"whole runs, {options.dataset}, mean of {options.seeds} seed(s)"
    write_record(f"runs_{options.dataset}", title, rows)


def run(overrides: list[str]) -> dict[str, float]:
    """Train in a process of its own.

    Returns:
        `seconds` of the whole process, of its last `epoch`, best `val` and `test` bits/dim.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["logger=csv", "trainer.enable_progress_bar=false"]
        command = [sys.executable, ROOT / "src/train.py", *quiet, f"hydra.run.dir={folder}"]
        start = time.perf_counter()
        subprocess.run(
            [*command, *overrides], env=environment, check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        with open(Path(folder) / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))

    def column(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row.get(key)]

    *_, before, end = 0.0, 0.0, *column("val/seconds_total")
    return {
        "seconds": seconds,
        "epoch": end - before,
        "val": min(column("val/bits_per_dim")),
        "test": column("test/bits_per_dim")[-1],
    }


if __name__ == "__main__":
    main()
