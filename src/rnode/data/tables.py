"""Tables: CSV, Parquet, Arrow, .npy and .npz files as vectors, by polars."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from rnode.data.context import Context
from rnode.data.splits import Splits, count_of, hold_out_indices, permutation
from rnode.errors import InputError, one_line, require
from rnode.transforms import Column, TableTransform

READERS = {
    ".csv": lambda path: pl.read_csv(path, infer_schema_length=None),
    ".tsv": lambda path: pl.read_csv(path, infer_schema_length=None, separator="\t"),
    ".parquet": pl.read_parquet,
    ".arrow": pl.read_ipc,
    ".feather": pl.read_ipc,
    ".npy": lambda path: from_arrays({"column": np.load(path, allow_pickle=False)}),
    ".npz": lambda path: from_arrays(dict(np.load(path, allow_pickle=False))),
}
DEPENDENT = 1e-6  # share of the largest variance; a combination with less is no more enlarged
REPEATED = 0.01  # share of the rows from which a value that repeats is worth a warning
SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
SPLIT_WORDS["test"] = ("test", "testing")


def table(
    path: str,
    columns: Sequence[str] | None = None,
    context: Sequence[str] | None = None,
    integer: Sequence[str] | None = None,
    log: Sequence[str] | None = None,
    logit: Mapping[str, Sequence[float]] | None = None,
    missing: str = "stop",
    split_column: str | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    whiten: bool = True,
) -> Splits:
    """Return the columns of a table, standardized by the training split: float64 (N, d).

    Args:
        path: the file; its ending says what it is.
        columns: the columns whose density is modelled; None: all numeric ones but `context`.
        context: the columns on which the density is conditioned.
        integer: the columns of whole numbers, which are dequantized.
        log: the positive columns whose logarithm is modelled.
        logit: the columns between two bounds, {name: [low, high]}, whose logit is modelled.
        missing: what happens to a row with a missing value: `stop` refuses the table, `drop` leaves
            the row out.
        split_column: the column that says train, val or test; None: a permutation that never
            changes cuts `validation` and `test`, each a share below 1 or a number of rows.
        validation: the validation split.
        test: the test split.
        whiten: whether the flow models uncorrelated combinations of the columns.
    """
    given, log, logit = list(context or ()), list(log or ()), dict(logit or {})
    frame = read_table(Path(path).expanduser())
    numeric = [name for name, dtype in frame.schema.items() if dtype.is_numeric()]
    left = {*given, split_column}
    used = [name for name in numeric if name not in left] if columns is None else list(columns)
    require(bool(used), f"{path}: has no numeric column to model")
    chosen = {"columns": used, "context": given, "integer": integer or (), "log": log}
    chosen |= {"logit": logit, "split_column": [split_column] if split_column else []}
    for option, names in chosen.items():
        for name in names:
            known = ", ".join(frame.columns[:20])
            require(name in frame.columns, f"{option}={name}: {path} has the columns {known}")
            inside = option in ("columns", "context", "split_column") or name in used
            require(inside, f"{option}={name}: must be one of the modelled columns")
    for name in used:
        dtype = frame.schema[name]
        number = dtype.is_numeric() or dtype == pl.Boolean
        require(number, f"columns={name}: must hold numbers; {path} has {dtype} there")
    require(not set(log) & set(logit), "log and logit: a column can be in one of the two")
    frame = drop_missing(frame, [*used, *given], path, missing)
    indices = split_rows(frame, split_column, validation, test)
    x = torch.from_numpy(frame.select(pl.col(used).cast(pl.Float64)).to_numpy(writable=True))
    parts = [x[index] for index in indices]
    transform = fit_columns(used, parts[0], integer or (), log, logit, x)
    transform = whitened(transform, parts[0]) if whiten else transform
    warn(frame.select(used), integer, path)
    if not given:
        return Splits(*parts, transform=transform)
    train, *_ = frames = [frame[index.numpy()] for index in indices]
    encoder = Context.fit({name: train[name].to_numpy() for name in given})
    encoded = [encoder.encode({name: part[name].to_numpy() for name in given}) for part in frames]
    return Splits(*parts, contexts=tuple(encoded), context=encoder, transform=transform)


def read_table(path: Path) -> pl.DataFrame:
    """Read a file of READERS."""
    known = ", ".join(READERS)
    require(path.suffix in READERS, f"path={path}: must end in one of {known}")
    require(path.is_file(), f"path={path}: there is no such file")
    try:
        if path.suffix in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8") as file:
                header = next(
                    csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","), []
                )
            twice = sorted({name for name in header if header.count(name) > 1})
            require(not twice, f"path={path}: has several columns named {', '.join(twice)}")
        frame = READERS[path.suffix](path)
    except InputError:
        raise
    except Exception as error:  # whatever a reader makes of a file that is not what its name says
        raise InputError(f"path={path}: cannot be read ({one_line(error)[:200]})") from None
    require(len(frame) > 0, f"path={path}: holds no rows")
    return frame


def from_arrays(arrays: dict[str, np.ndarray]) -> pl.DataFrame:
    """Vectors (N,) as columns; matrices (N, d) as the columns name_0 to name_{d − 1}."""
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        shape = f"{name} has the shape {array.shape}; a table needs (rows,) or (rows, columns)"
        require(array.ndim in (1, 2), shape)
        parts = {name: array} if array.ndim == 1 else dict(enumerate(array.T))
        columns |= {
            key if array.ndim == 1 else f"{name}_{key}": part for key, part in parts.items()
        }
    return pl.DataFrame(columns)


def drop_missing(frame: pl.DataFrame, names: list[str], path: str, missing: str) -> pl.DataFrame:
    """Return the rows without nulls and NaN in the columns `names`."""
    floats = [name for name in names if frame.schema[name].is_float()]
    frame = frame.with_columns(pl.col(floats).fill_nan(None))
    counts = {name: count for name in names if (count := frame[name].null_count())}
    if not counts:
        return frame
    words = ", ".join(f"{name} ({count})" for name, count in counts.items())
    wrong = f"{path}: values are missing in {words}; missing=drop leaves these rows out"
    require(missing == "drop", wrong)
    whole = frame.drop_nulls(names)
    print(f"{len(frame) - len(whole)} of {len(frame)} rows are left out: values missing in {words}")
    return whole


def split_rows(
    frame: pl.DataFrame, split_column: str | None, validation: float, test: float
) -> list[Tensor]:
    """Return the indices of the rows of each split, as `split_column` or a permutation says."""
    if split_column is not None:
        words = frame[split_column].cast(pl.String).str.to_lowercase().to_numpy()
        known = {word for words in SPLIT_WORDS.values() for word in words}
        other = sorted(set(map(str, words)) - known)[:3]
        require(not other, f"split_column={split_column}: holds {other}, not train, val and test")
        masks = [np.isin(words, SPLIT_WORDS[name]) for name in ("train", "val", "test")]
        train, val, test = (torch.from_numpy(mask.nonzero()[0]) for mask in masks)
        # A validation may take the first rows alone, and a file may be sorted.
        return [train, val[permutation(len(val))], test]
    n = len(frame)
    rest, held = hold_out_indices(n, count_of(test, n), "test")
    kept, chosen = hold_out_indices(len(rest), count_of(validation, n), "validation")
    return [rest[kept], rest[chosen], held]


def fit_columns(
    names: Sequence[str],
    train: Tensor,
    integer: Sequence[str],
    log: Sequence[str],
    logit: Mapping[str, Sequence[float]],
    rows: Tensor,
) -> TableTransform:
    """Standardize each column by the training split (N, d), after its logarithm or logit."""
    columns = []
    for name, values, every in zip(names, train.T, rows.T, strict=True):
        whole, bounds = name in integer, logit.get(name)
        if bounds is not None:  # x + noise is below x + 1
            bounds = (float(bounds[0]), float(bounds[1]) + whole)
        column = Column(name, whole, name in log, bounds)
        column.require_inside(every)
        y, _ = column(values, torch.full_like(values, 0.5))
        columns.append(column._replace(mean=float(y.mean()), std=float(y.std(correction=0)) or 1.0))
    return TableTransform(columns)


def whitened(transform: TableTransform, train: Tensor) -> TableTransform:
    """The transform, followed by the whitening of the training split (N, d)."""
    return TableTransform(transform.columns, fit_whitening(transform, train))


def fit_whitening(transform: TableTransform, train: Tensor) -> Tensor:
    """Return the matrix that makes the columns of the training split (N, d) uncorrelated."""
    c = train.new_empty(len(train), 0)
    y = transform(train, torch.arange(len(train)), c, torch.full(train.shape, 0.5)).y.double()
    variances, directions = torch.linalg.eigh(torch.cov(y.T).reshape(2 * [len(train.T)]))
    return directions / variances.clamp(min=DEPENDENT * variances.max()).sqrt()


def warn(frame: pl.DataFrame, integer: Sequence[str] | None, path: str) -> None:
    """Print which columns have a density that is not what it seems."""
    varies = [name for name in frame.columns if frame[name].n_unique() > 1]
    whole = [name for name in varies if integer is None and is_whole(frame[name])]
    if whole:
        listed = ",".join(whole)
        words = f"whole numbers in {listed}, whose density rises without bound"
        print(f"{path}: {words}; dataset.integer=[{listed}] dequantizes them")
    for name in frame.columns:
        if name in (integer or whole):
            continue
        value, count = next(frame[name].value_counts(sort=True, name="n").iter_rows())
        if count > max(1, REPEATED * len(frame)):
            words = "the likelihood there is of the value's point mass and rises without bound"
            print(f"{path}: {name} is {value} in {count} of {len(frame)} rows: {words}")


def is_whole(column: pl.Series) -> bool:
    return column.dtype.is_integer() or bool((column == column.round(0)).all())
