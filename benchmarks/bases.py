"""Image flows with the standard normal and with a Gaussian as base, after equal training time.

python benchmarks/bases.py [--seconds 40] [--seeds 0 1 2] [--root DIR] [--quick]

Each row is the flow of the command line with one base and one learning rate. FashionMNIST is
reduced to 14×14; `--root` holds its files, and without it the digits alone are measured. Figures
are means over the seeds: test bits/dim by dopri5, evaluations of f and kinetic energy per dimension
of the test, and bits/dim of the first validation, which a Gaussian base has before training; ± is
their standard deviation. Of the test, at most 1,800 images count. The seconds are those in which
`rnode.load(…)` evaluates IMAGES test images, and samples as many.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import rnode
from common import as_time, mean_and_spread, timed, write_record

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"normal": ("1.0e-2", "2.0e-2"), "gaussian": ("1.0e-2", "2.0e-2")}  # learning rates
QUIET = ["logger=csv", "callbacks.figures=null", "trainer.enable_progress_bar=false"]
LIMITED = ["trainer.limit_val_batches=5", "trainer.limit_test_batches=5"]  # of 360 images
IMAGES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=40, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", help="folder of FashionMNIST")
    parser.add_argument("--quick", action="store_true", help="one seed, 2 seconds, the digits")
    options = parser.parse_args()
    data = {"digits": ["dataset=digits"]}
    if options.root:
        data["FashionMNIST 14×14"] = [
            *("dataset=fashion_mnist", f"dataset.root={options.root}", "dataset.resize=14"),
            *("dataset.batch_size=32", "dataset.eval_batch_size=360"),
            *("model.hidden=16", "model.pieces=1", *LIMITED),
        ]
    if options.quick:
        options.seconds, options.seeds = 2, [0]

    rows = []
    for name, dataset in data.items():
        for base, rates in RUNS.items():
            for rate in rates:
                limits = [f"trainer.max_time={as_time(options.seconds)}", "trainer.max_epochs=-1"]
                overrides = [*dataset, f"base={base}", f"optimizer.lr={rate}", *limits, *QUIET]
                runs = [run([*overrides, f"seed={seed}"]) for seed in options.seeds]
                measured = {key: [each[key] for each in runs] for key in runs[0]}
                row = {"data": name, "base": base, "learning rate": rate}
                row |= {key: mean_and_spread(values, 3) for key, values in measured.items()}
                rows.append(row)
                print(row, flush=True)
    write_record("bases", f"bases of image flows, {options.seconds} s of training", rows)


def run(overrides: list[str]) -> dict[str, float]:
    """Train once in a process of its own, and return what the run has measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "src/train.py", *overrides, f"folder={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
        with open(Path(folder, "metrics.csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        density = rnode.load(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        density.data_.setup()
    images = density.data_.splits.test[:IMAGES].numpy()
    density.evaluate(images[:2])  # the first call loads code
    first = next(float(row["val/bits_per_dim"]) for row in rows if row.get("val/bits_per_dim"))
    return {
        "first validation": first,
        "test bits/dim": result["test/bits_per_dim"],
        "NFE": result["test/nfe_forward"],
        "kinetic energy": result["test/kinetic"],
        "evaluation, seconds": timed(lambda: density.evaluate(images)),
        "sampling, seconds": timed(lambda: density.sample(IMAGES, seed=0)),
    }


if __name__ == "__main__":
    main()
