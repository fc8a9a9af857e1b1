"""Tables: CSV, Parquet, Arrow, .npy and .npz files as vectors, by polars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rnode.data.conditions import Conditions
from rnode.data.splits import SPLIT_NAMES, SPLIT_WORDS, Splits, count_of, hold_out, permutation
from rnode.errors import InputError, one_line, require
from rnode.transforms import Column, TableTransform

READERS = {
    ".csv": lambda path: pl.read_csv(path, infer_schema_length=None),
    ".tsv": lambda path: pl.read_csv(path, infer_schema_length=None, separator="\t"),
    ".parquet": pl.read_parquet,
    ".arrow": pl.read_ipc,
    ".feather": pl.read_ipc,
    ".npy": lambda path: from_arrays({"column": np.load(path)}),
    ".npz": lambda path: from_arrays(np.load(path)),
}
VARIANCE_FLOOR = 1e-6  # share of the largest variance; directions with less are not scaled up
REPETITION_LIMIT = 0.01  # share of the rows above which a repeated value is worth a warning


@dataclass(frozen=True)
class Table:
    """A table, and how it is modelled."""

    path: str  # the file; its ending says its format
    columns: Sequence[str] | None = None  # that are modelled; None: all numeric ones but `context`
    context: Sequence[str] | None = None  # columns on which the density is conditioned
    integer: Sequence[str] | None = None  # columns of whole numbers, which are dequantized
    log: Sequence[str] | None = None  # positive columns whose logarithm is modelled
    logit: Mapping[str, Sequence[float]] | None = None  # {name: [low, high]}: the logit is modelled
    missing: str = "stop"  # at a row with a missing value, or `drop` the row
    split_column: str | None = None  # says train, val or test; None: `hold_out` cuts two splits off
    validation: float = 0.1  # a share of all rows, below 1, or a number of rows
    test: float = 0.1  # likewise
    whiten: bool = True  # whether the flow models uncorrelated combinations of the columns

    def splits(self) -> Splits:
        """Return the modelled columns, float64 (N, d), standardized by the training split."""
        frame = read_table(Path(self.path).expanduser())
        names = self.modelled(frame)
        context = list(self.context or ())
        frame = self.without_missing(frame, [*names, *context])
        parts = hold_out(self.parts(frame), count_of(self.validation, len(frame)), self.test)
        x = torch.from_numpy(frame.select(pl.col(names).cast(pl.Float64)).to_numpy(writable=True))
        train, val, test = (x[parts[split]] for split in SPLIT_NAMES)
        transform = TableTransform(self.fit_columns(names, train, x))
        if self.whiten:
            whitening = fit_whitening(transform, train)
            transform = TableTransform(transform.columns, whitening)
        self.warn(frame.select(names))
        indices = [parts[split].numpy() for split in SPLIT_NAMES]
        values = [{name: frame[name].to_numpy()[i] for name in context} for i in indices]
        return Splits(train, val, test, transform, Conditions.fit(values[0]), values)

    def modelled(self, frame: pl.DataFrame) -> list[str]:
        """Return the names of the modelled columns, after checking that the options fit them."""
        context = self.context or ()
        split = [] if self.split_column is None else [self.split_column]
        numeric = [name for name, dtype in frame.schema.items() if dtype.is_numeric()]
        names = [name for name in numeric if name not in {*context, *split}]
        names = names if self.columns is None else list(self.columns)
        require(bool(names), f"{self.path}: has no numeric column to model")
        known = ", ".join(frame.columns[:20])
        for option, chosen in {"columns": names, "context": context, "split_column": split}.items():
            for name in chosen:
                message = f"{option}={name}: {self.path} has the columns {known}"
                require(name in frame.columns, message)
        for option in ("integer", "log", "logit"):
            for name in getattr(self, option) or ():
                require(name in names, f"{option}={name}: must be one of the modelled columns")
        for name in names:
            dtype = frame.schema[name]
            message = f"columns={name}: must hold numbers; {self.path} has {dtype} there"
            require(dtype.is_numeric() or dtype == pl.Boolean, message)
        return names

    def without_missing(self, frame: pl.DataFrame, names: list[str]) -> pl.DataFrame:
        """Return the rows without nulls and NaN in the columns `names`."""
        floats = [name for name in names if frame.schema[name].is_float()]
        frame = frame.with_columns(pl.col(floats).fill_nan(None))
        counts = {name: count for name in names if (count := frame[name].null_count())}
        words = ", ".join(f"{name} ({count})" for name, count in counts.items())
        message = f"{self.path}: values are missing in {words}; missing=drop leaves these rows out"
        require(not counts or self.missing == "drop", message)
        rest = frame.drop_nulls(names)
        if counts:
            count = f"{len(frame) - len(rest)} of {len(frame)} rows"
            print(f"{count} are left out: values missing in {words}")
        return rest

    def parts(self, frame: pl.DataFrame) -> dict[str, Tensor]:
        """Return the indices of the rows of each split that `split_column` names."""
        if self.split_column is None:
            return {"train": torch.arange(len(frame))}
        words = frame[self.split_column].cast(pl.String).str.to_lowercase().to_list()
        other = sorted(set(map(str, words)) - SPLIT_WORDS.keys())[:3]
        message = f"split_column={self.split_column}: holds {other}, not train, val and test"
        require(not other, message)
        splits = np.array([SPLIT_WORDS[word] for word in words])
        parts = {name: torch.from_numpy((splits == name).nonzero()[0]) for name in SPLIT_NAMES}
        # A validation may take the first rows alone, and a file may be sorted.
        parts["val"] = parts["val"][permutation(len(parts["val"]))]
        return parts

    def fit_columns(self, names: list[str], train: Tensor, rows: Tensor) -> list[Column]:
        """Standardize each column by the training split (N, d), after its logarithm or logit."""
        columns = []
        for name, values, every in zip(names, train.T, rows.T, strict=True):
            integer = name in (self.integer or ())
            bounds = (self.logit or {}).get(name)
            if bounds is not None:  # x + noise is below x + 1
                bounds = (float(bounds[0]), float(bounds[1]) + integer)
            column = Column(name, integer, name in (self.log or ()), bounds)
            column.require_inside(every)
            y, _ = column(values, torch.full_like(values, 0.5))
            std = float(y.std(correction=0)) or 1.0
            columns.append(column._replace(mean=float(y.mean()), std=std))
        return columns

    def warn(self, frame: pl.DataFrame) -> None:
        """Print the columns whose likelihood is misleading: whole numbers and repeated values."""
        integer = self.integer
        if integer is None:
            integer = [name for name in frame.columns if is_integer(frame[name])]
        if integer and self.integer is None:
            listed = ",".join(integer)
            words = f"whole numbers in {listed}, whose density rises without bound"
            print(f"{self.path}: {words}; dataset.integer=[{listed}] dequantizes them")
        for name in (name for name in frame.columns if name not in integer):
            value, count = next(frame[name].value_counts(sort=True, name="n").iter_rows())
            if count > max(1, REPETITION_LIMIT * len(frame)):
                words = "the likelihood there is of the value's point mass and rises without bound"
                print(f"{self.path}: {name} is {value} in {count} of {len(frame)} rows: {words}")


def table(**options: Any) -> Splits:
    """Return the splits of a table; the options are the fields of `Table`."""
    return Table(**options).splits()


def fit_whitening(transform: TableTransform, train: Tensor) -> Tensor:
    """Return the matrix that makes the columns of the training split (N, d) uncorrelated."""
    n, d = train.shape
    y = transform(train, torch.arange(n), torch.empty(n, 0), torch.full((n, d), 0.5)).y.double()
    variances, directions = torch.linalg.eigh(torch.cov(y.T).reshape(d, d))
    return directions / variances.clamp(min=VARIANCE_FLOOR * variances.max()).sqrt()


def is_integer(column: pl.Series) -> bool:
    """Whether a column that varies holds whole numbers alone."""
    whole = column.dtype.is_integer() or bool((column == column.round(0)).all())
    return whole and column.n_unique() > 1


def read_table(path: Path) -> pl.DataFrame:
    """Read a file of READERS."""
    require(path.suffix in READERS, f"path={path}: must end in one of {', '.join(READERS)}")
    require(path.is_file(), f"path={path}: there is no such file")
    try:
        frame = READERS[path.suffix](path)
    except Exception as error:  # whatever a reader makes of a file that is not what its name says
        raise InputError(f"path={path}: cannot be read ({one_line(error)[:200]})") from None
    require(len(frame) > 0, f"path={path}: holds no rows")
    twice = ", ".join(name for name in frame.columns if "_duplicated_" in name)  # polars adds that
    require(not twice, f"path={path}: has several columns of one name ({twice})")
    return frame


def from_arrays(arrays: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """Vectors (N,) as columns; matrices (N, d) as the columns name_0 to name_{d − 1}."""
    columns = {}
    for name, array in arrays.items():
        require(array.ndim in (1, 2), f"{name} has the shape {array.shape}, not (N,) or (N, d)")
        if array.ndim == 1:
            columns[name] = array
        else:
            columns |= {f"{name}_{i}": column for i, column in enumerate(array.T)}
    return pl.DataFrame(columns)
