"""Tables: CSV, TSV, Parquet, Arrow and .npy files as vectors, by polars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
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
    ".npy": lambda path: pl.from_numpy(np.load(path), orient="row"),
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

    def splits(self) -> Splits:
        """Return the modelled columns, float64 (N, d), standardized by the training split."""
        frame = read_table(Path(self.path).expanduser())
        names = self.modelled(frame)
        context = list(self.context or ())
        frame = self.without_missing(frame, [*names, *context])
        parts = hold_out(self.parts(frame), count_of(self.validation, len(frame)), self.test)
        x = torch.from_numpy(frame.select(pl.col(names).cast(pl.Float64)).to_numpy(writable=True))
        train, val, test = (x[parts[split]] for split in SPLIT_NAMES)
        plain = TableTransform(self.fit_columns(names, train))
        plain.require_inside(x)
        transform = TableTransform(plain.columns, fit_whitening(plain, train))
        self.warn(frame.select(names))
        columns = {name: frame[name].to_numpy() for name in context}
        values = [{k: v[parts[split]] for k, v in columns.items()} for split in SPLIT_NAMES]
        return Splits(train, val, test, transform, Conditions.fit(values[0]), values)

    def modelled(self, frame: pl.DataFrame) -> list[str]:
        """Return the names of the modelled columns, after checking that the options fit them."""
        split = [] if self.split_column is None else [self.split_column]
        numeric = frame.select(cs.numeric()).columns
        names = [name for name in numeric if name not in [*(self.context or ()), *split]]
        names = names if self.columns is None else list(self.columns)
        require(bool(names), f"{self.path}: has no numeric column to model")
        for option, chosen, known in (
            ("columns", names, frame.select(cs.numeric() | cs.boolean()).columns),
            ("context", self.context, frame.columns),
            ("split_column", split, frame.columns),
            ("integer", self.integer, names),
            ("log", self.log, [name for name in names if name not in (self.logit or ())]),
            ("logit", self.logit, names),
        ):
            wrong = [name for name in chosen or () if name not in known]
            message = f"{option}={','.join(wrong)}: must be among {', '.join(known[:20])}"
            require(not wrong, message)
        return names

    def without_missing(self, frame: pl.DataFrame, names: list[str]) -> pl.DataFrame:
        """Return the rows without nulls and NaN in the columns `names`."""
        frame = frame.with_columns((cs.by_name(names) & cs.float()).fill_nan(None))
        counts = {name: count for name in names if (count := frame[name].null_count())}
        if not counts:
            return frame
        words = ", ".join(f"{name} ({count})" for name, count in counts.items())
        message = f"{self.path}: values are missing in {words}; missing=drop leaves these rows out"
        require(self.missing == "drop", message)
        rest = frame.drop_nulls(names)
        count = f"{len(frame) - len(rest)} of {len(frame)} rows"
        print(f"{count} are left out: values missing in {words}")
        return rest

    def parts(self, frame: pl.DataFrame) -> dict[str, np.ndarray]:
        """Return the indices of the rows of each split that `split_column` names."""
        if self.split_column is None:
            return {"train": np.arange(len(frame))}
        words = frame[self.split_column].cast(pl.String).str.to_lowercase().to_list()
        other = sorted(set(map(str, words)) - SPLIT_WORDS.keys())[:3]
        message = f"split_column={self.split_column}: holds {other}, not train, val and test"
        require(not other, message)
        splits = np.array([SPLIT_WORDS[word] for word in words])
        parts = {name: (splits == name).nonzero()[0] for name in SPLIT_NAMES}
        # A validation may take the first rows alone, and a file may be sorted.
        parts["val"] = parts["val"][permutation(len(parts["val"]))]
        return parts

    def fit_columns(self, names: list[str], train: Tensor) -> list[Column]:
        """Standardize each column by the training split (N, d), after its logarithm or logit."""
        columns = []
        for name, values in zip(names, train.T, strict=True):
            integer = name in (self.integer or ())
            bounds = (self.logit or {}).get(name)
            if bounds is not None:  # x + noise is below x + 1
                bounds = (float(bounds[0]), float(bounds[1]) + integer)
            column = Column(name, integer, name in (self.log or ()), bounds)
            y, _ = column(values, torch.full_like(values, 0.5))
            std = float(y.std(correction=0)) or 1.0
            columns.append(column._replace(mean=float(y.mean()), std=std))
        return columns

    def warn(self, frame: pl.DataFrame) -> None:
        """Print the columns whose likelihood is misleading: whole numbers and repeated values."""
        integer = self.integer
        if integer is None:
            varying = [column for column in frame if column.n_unique() > 1]
            integer = [c.name for c in varying if (c.cast(pl.Float64) % 1 == 0).all()]
            if listed := ",".join(integer):
                words = f"whole numbers in {listed}, whose density rises without bound"
                print(f"{self.path}: {words}; dataset.integer=[{listed}] dequantizes them")
        for column in frame.drop(integer):
            value, count = next(column.value_counts(sort=True, name="n").iter_rows())
            if count > max(1, REPETITION_LIMIT * len(frame)):
                words = f"{column.name} is {value} in {count} of {len(frame)} rows: the likelihood"
                words += " there is of the value's point mass and rises without bound"
                print(f"{self.path}: {words}")


def table(**options: Any) -> Splits:
    """Return the splits of a table; the options are the fields of `Table`."""
    return Table(**options).splits()


def fit_whitening(transform: TableTransform, train: Tensor) -> Tensor:
    """Return the matrix that makes the columns of the training split (N, d) uncorrelated."""
    d = train.shape[1]
    y = transform.forward(train, torch.full_like(train, 0.5))[0].double()
    variances, directions = torch.linalg.eigh(torch.cov(y.T).reshape(d, d))
    return directions / variances.clamp(min=VARIANCE_FLOOR * variances.max()).sqrt()


def read_table(path: Path) -> pl.DataFrame:
    """Read a file of READERS."""
    require(path.suffix in READERS, f"path={path}: must end in one of {', '.join(READERS)}")
    require(path.is_file(), f"path={path}: there is no such file")
    try:
        frame = READERS[path.suffix](path)
    except Exception as error:  # whatever a reader makes of a file that is not what its name says
        raise InputError(f"path={path}: cannot be read ({one_line(error)[:200]})") from None
    require(len(frame) > 0, f"path={path}: holds no rows")
    return frame
