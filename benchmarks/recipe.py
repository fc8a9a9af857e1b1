"""Settings of the training recipe, after equal training time.

python benchmarks/recipe.py --dataset digits --overrides optimizer.lr=1e-2 optimizer.lr=2e-2
python benchmarks/recipe.py --dataset fashion_mnist --root DIR [--seconds 120] [--seeds 0 1 2]
                            --overrides optimizer.lr=1e-2 "optimizer.lr=4e-2 warmup_steps=100"

Each of the `--overrides` is one setting, whose overrides are separated by spaces. It trains from
the defaults of the command line for the given seconds, without a validation in between, and the
learning rate decays over them. FashionMNIST is reduced to 14×14; its flow and that of
colour patches have 16 channels and one piece.
The table has the validation bits/dim of the last weights by the test solver, for each seed, and
means over the seeds of the training steps and of the NFE of a validation.
The record is benchmarks/results/recipe_DATASET.json.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import as_time, mean_and_spread, write_record

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "digits": ["dataset=digits"],
    "fashion_mnist": [
        *("dataset=fashion_mnist", "dataset.resize=14", "dataset.batch_size=32"),
        *("model.hidden=16", "model.pieces=1", "trainer.limit_val_batches=5"),
    ],
    "patches": [
        *("dataset=patches", "dataset.batch_size=16"),
        *("model.hidden=16", "model.pieces=1", "trainer.limit_val_batches=2"),
    ],
}
QUIET = [
    *("logger=csv", "callbacks.figures=null", "callbacks.interval.every_n_steps=100000"),
    *("trainer.enable_progress_bar=false", "trainer.limit_test_batches=1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATA, default="digits")
    parser.add_argument("--root", help="folder of FashionMNIST's files")
    parser.add_argument("--seconds", type=int, default=60, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="+", default=[""], help="the settings")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 seconds")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.seeds = 2, [0]
    limits = [f"trainer.max_time={as_time(options.seconds)}"]
    limits += ["trainer.max_epochs=-1", *QUIET]
    data = DATA[options.dataset] + ([f"dataset.root={options.root}"] if options.root else [])

    rows = []
    for setting in options.overrides:
        seeds = [[f"seed={seed}", *setting.split()] for seed in options.seeds]
        runs = [run([*data, *limits, *overrides]) for overrides in seeds]
        finished = [each for each in runs if each is not None]
        bits = [each["val/bits_per_dim"] for each in finished]
        row = {
            "data": f"{options.dataset}, {options.seconds} s",
            "setting": setting or "default",
            "validation bits/dim": mean_and_spread(bits, 3) if len(bits) == len(runs) else "",
            "by seed": ", ".join(
                f"{each['val/bits_per_dim']:.3f}" if each else "diverged" for each in runs
            ),
        }
        for name, column in (("steps", "step"), ("NFE", "val/nfe_forward")):
            values = [each[column] for each in finished]
            row[name] = f"{statistics.mean(values):.0f}" if values else ""
        rows.append(row)
        print(row, flush=True)
    title = f"recipe, {options.dataset}, {options.seconds} s of training"
    write_record(f"recipe_{options.dataset}", title, rows)


def run(overrides: list[str]) -> dict[str, float] | None:
    """Train once in a process of its own.

    Returns:
        The last validation as metrics.csv has it; None if the run diverged.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "src/train.py", *overrides, f"hydra.run.dir={folder}"]
        process = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ)
        if Path(folder, "diverged.txt").exists():
            return None
        process.check_returncode()
        with open(Path(folder, "metrics.csv"), newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["val/bits_per_dim"]]
    return {column: float(value) for column, value in rows[-1].items() if value}


if __name__ == "__main__":
    main()
