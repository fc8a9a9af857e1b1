"""POWER, HEPMASS, MINIBOONE and BSDS300, as Papamakarios et al. (2017) distribute and split them.

The files are those of zenodo.org/record/1161203. GAS is distributed as a pickle, which could
execute code when it is read; written as Parquet it is a table like others.
"""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from rnode.data.splits import Splits
from rnode.data.tables import fit_columns, read_table, whitened
from rnode.errors import InputError, require, require_choice


def uci(name: str, root: str, whiten: bool = True) -> Splits:
    """Return a table of TABLES from the folder `root`/`name`, standardized by its training rows."""
    require_choice("name", name, TABLES)
    folder = Path(root).expanduser() / name
    require(folder.is_dir(), f"root={root}: there is no folder {name}")
    parts = [torch.from_numpy(np.ascontiguousarray(part)).double() for part in TABLES[name](folder)]
    names = [f"column_{i}" for i in range(parts[0].shape[1])]
    transform = fit_columns(names, parts[0], (), (), {}, parts[0])
    return Splits(*parts, transform=whitened(transform, parts[0]) if whiten else transform)


def rows_of(path: Path) -> np.ndarray:
    return read_table(path).to_numpy()


def last_tenths(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last tenth is for the test, the last tenth of the rest for validation."""
    test = len(rows) // 10
    validation = (len(rows) - test) // 10
    return rows[: -test - validation], rows[-test - validation : -test], rows[-test:]


def power(folder: Path) -> tuple[np.ndarray, ...]:
    """Six of the nine columns in random order, with noise of the width of their rounding."""
    rng = np.random.RandomState(42)
    rows = rows_of(folder / "data.npy")
    rng.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)
    widths = np.array([0.001, 0.01, 1.0, 1.0, 1.0, 0.0])
    return last_tenths(rows + widths * rng.rand(*rows.shape))


def miniboone(folder: Path) -> tuple[np.ndarray, ...]:
    return last_tenths(rows_of(folder / "data.npy"))


def hepmass(folder: Path) -> tuple[np.ndarray, ...]:
    """The rows of signals, without their label and without columns that repeat a value often."""
    train, test = (read_table(folder / f"1000_{part}.csv") for part in ("train", "test"))
    label = train.columns[0]
    train, test = (part.filter(pl.col(label) == 1).drop(label) for part in (train, test))
    columns = [c for c in train.columns if train[c].value_counts()["count"].max() <= 5]
    train, test = (part.select(columns).to_numpy() for part in (train, test))
    validation = len(train) // 10
    return train[:-validation], train[-validation:], test


def bsds300(folder: Path) -> tuple[np.ndarray, ...]:
    try:
        import h5py  # needed here alone
    except ImportError:
        raise InputError("name=bsds300: needs h5py; pip install h5py") from None
    path = folder / "BSDS300.hdf5"
    require(path.is_file(), f"path={path}: there is no such file")
    with h5py.File(path) as file:
        return tuple(file[part][:] for part in ("train", "validation", "test"))


TABLES = {"power": power, "hepmass": hepmass, "miniboone": miniboone, "bsds300": bsds300}
