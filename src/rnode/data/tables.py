"""Tables as columns of numbers and labels: files, DataFrames, dictionaries and arrays."""

import json
import re
import shlex
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import torch

from rnode.data.conditions import as_array
from rnode.data.splits import SPLIT_NAMES, SPLIT_WORDS, Splits, count_of, hold_out, permutation
from rnode.errors import InputError, one_line, require
from rnode.transforms import Column, TableTransform

MISSING_VALUES = ["", "-", "?", "na", "n/a", "#n/a", "<na>", "nan", "nat", "none", "null"]
SIGN = "[$€£¥%]"  # of money or per cent: all cells of a column have the same, or none has one
THOUSANDS = r"^[+-]?\d{1,3}([,'’\s]\d{3})+(\.\d*)?$"  # such as 1,234.5
DECIMAL_COMMA = r"^\s*[+-]?(\d*|\d{1,3}(\.\d{3})+),\d+\s*$"  # in a file with semicolons
INDEX_NAMES = r"|Unnamed: \d+|__index_level_\d+__"  # what files hold for the index of pandas
SMALLEST_UNIT = 1e-6  # of the range of a column that is rounded
REPETITION_LIMIT = 0.01  # share of the rows above which a repeated value is worth a warning
IN_PYTHON: ContextVar[bool] = ContextVar("IN_PYTHON", default=False)  # how `hint` names options

Names = Sequence[str | float | bool | None]  # a command line reads the name 2019 as a number


def table(
    path: str,  # the file; its ending says its format
    columns: Names | None = None,  # that are modelled; None: all numeric ones but `context`
    context: Names | None = None,  # columns on which the density is conditioned
    integer: Names | None = None,  # columns of whole numbers, which are dequantized
    log: Names | None = None,  # positive columns whose logarithm is modelled
    logit: Mapping[str, Sequence[float]] | None = None,  # {name: [low, high]} of those for a logit
    weight: str | float | bool | None = None,  # column of the rows' weights, which is not modelled
    missing: str = "stop",  # at a row with a missing or infinite value, or `drop` the row
    split_column: str | None = None,  # says train, val or test; None: `hold_out` cuts them off
    validation: float = 0.1,  # a share of all rows, below 1, or a number of rows
    test: float = 0.1,  # likewise
) -> Splits:
    """Return the rows of a table, float64 (N, d), with a transform that is not fitted."""
    file = Path(path).name
    frame = read_table(Path(path).expanduser())
    split = choose("split_column", split_column and [split_column], frame.columns)
    weighing = choose("weight", weight and [weight], frame.columns)
    usable = frame.select(cs.numeric(), cs.string(), cs.boolean()).columns
    labels = choose("context", context, usable)
    others = [*labels, *split, *weighing]
    rest = frame.drop(others)
    names = choose("columns", columns, rest.columns) or numeric(rest, file)
    x = numbers(frame, [*names, *weighing], file)
    left_out = [f"{c.name or 'no name'} ({c.dtype})" for c in rest.drop(names)]
    words = f"{file}: {len(frame)} rows; modelled: {listed(names)}"
    print(f"{words}; given: {listed(others)}" if others else words)
    if left_out:
        announce(f"{file}: left out: {listed(left_out)}")
    frame = complete(frame.with_columns(x), [*names, *labels, *weighing], missing, file)
    for name in weighing:
        low, high = frame[name].min() or 0, frame[name].max() or 0
        right = "must be 0 or more, and not zero in all rows"
        require(low >= 0 and high > 0, f"weight={name}: is {low:g} to {high:g}; {right}")
        frame = frame.filter(pl.col(name) > 0)
    require(len(frame) > 3, f"{file}: {len(frame)} rows are too few")
    rounded = dict.fromkeys(choose("integer", integer, names), (1.0, 0.0))
    rounded = grids_of(frame[names], file) if integer is None else rounded
    grids = dict.fromkeys(names, (0.0, 0.0)) | rounded  # the unit and the origin of each column
    logit = logit or {}
    bounds = {}
    for name, (low, high) in zip(choose("logit", logit, names), logit.values(), strict=True):
        bounds[name] = (float(low), float(high) + grids[name][0])  # x + noise is below x + unit
    logs = choose("log", log, [name for name in names if name not in bounds])
    modelled = [Column(name, *grids[name], name in logs, bounds.get(name)) for name in names]
    rows = split_rows(frame[split[0]]) if split else {"train": np.arange(len(frame))}
    rows = hold_out(rows, count_of(validation, len(frame)), test)
    frames = [frame[rows[name]] for name in SPLIT_NAMES]
    tensors = [torch.from_numpy(part[names].to_numpy() + 0.0) for part in frames]  # −0 is 0
    conditions = [{name: part[name].to_numpy() for name in labels} for part in frames]
    weights = [part[name].to_torch() for part in frames for name in weighing] or None
    transform = TableTransform(modelled)
    return Splits(*tensors, transform, columns=conditions, weights=weights, fitted=False)


def numeric(frame: pl.DataFrame, file: str) -> list[str]:
    """Return the columns of numbers; some other text among the numbers of one is an error."""
    columns = [column for column in frame if not re.fullmatch(INDEX_NAMES, column.name)]
    for column in columns:
        if column.dtype == pl.String and 2 * to_numbers(column).count() > column.count():
            numbers(frame, [column.name], file)
    names = [column.name for column in columns if column.dtype.is_numeric()]
    types = listed([f"{column.name}: {column.dtype}" for column in frame])
    require(bool(names), f"{file}: has no numeric column to model ({types})")
    return names


def complete(frame: pl.DataFrame, names: list[str], missing: str, file: str) -> pl.DataFrame:
    """Return the rows without missing and infinite values in the columns `names`."""
    floats = cs.by_name(names) & cs.float()
    frame = frame.with_columns(pl.when(floats.is_finite()).then(floats))
    counts = [f"{name} ({count})" for name in names if (count := frame[name].null_count())]
    if not counts:
        return frame
    message = f"{file}: values are missing or infinite in {listed(counts)}; "
    require(missing == "drop", f"{message}{hint('missing', 'drop')} leaves the rows out")
    rest = frame.drop_nulls(names)
    print(f"{message}{len(frame) - len(rest)} of {len(frame)} rows are left out")
    return rest


def split_rows(column: pl.Series) -> dict[str, np.ndarray]:
    """Return the indices of the rows of each split that a column names."""
    words = column.cast(pl.String).str.to_lowercase().fill_null("")
    splits = words.replace_strict(SPLIT_WORDS, default="")
    other = words.filter(splits == "").unique().sort()[:3].to_list()
    require(not other, f"split_column={column.name}: holds {other}, not train, val and test")
    parts = {name: (splits == name).arg_true().to_numpy() for name in SPLIT_NAMES}
    # A validation may take the first rows alone, and a file may be sorted.
    parts["val"] = parts["val"][permutation(len(parts["val"]))]
    return {name: part for name, part in parts.items() if len(part) or name == "train"}


def grids_of(frame: pl.DataFrame, file: str) -> dict[str, tuple[float, float]]:
    """Return the unit and the origin of columns that are rounded, which are then dequantized.

    A column is rounded if a value is repeated often. Its unit is the smallest difference of values.
    """
    grids = {}
    unrounded = []  # columns of whole numbers
    spiked = []  # columns with a repeated value
    for column in frame:
        values = column.unique().sort().cast(pl.Float64)
        often = column.unique_counts().max() > max(2, REPETITION_LIMIT * len(frame))
        width = values[-1] - values[0]
        unit = values.diff().min()
        unit = width / round(width / unit) if unit else 0.0  # a difference has errors of rounding
        integers = (column % 1 == 0).all()
        if len(values) > 1 and often and unit > SMALLEST_UNIT * width:
            grids[column.name] = (1.0, 0.0) if integers else (unit, values[0])
        elif len(values) > 1 and integers:
            unrounded.append(column.name)
        elif often:
            spiked.append(column.name)
    if grids:
        units = listed([f"{name} ({unit:g})" for name, (unit, _) in grids.items()])
        announce(f"{file}: rounded columns get noise of their unit: {units}")
    if unrounded:
        words = f"whole numbers in {listed(unrounded)}, whose density rises without bound"
        announce(f"{file}: {words}; {hint('integer', unrounded)} dequantizes them")
    if spiked:
        words = f"a repeated value, where the density rises without bound: {listed(spiked)}"
        announce(f"{file}: {words}; leave these columns out")
    return grids


def choose(option: str, values: Names | Mapping | None, known: Collection[str]) -> list[str]:
    """Return the columns among `known` that an option names."""
    chosen = []
    for value in values or ():
        name = value.strip() if isinstance(value, str) else json.dumps(value)  # true, null, 2019
        require(name in known, f"{option}={name}: must be among {listed(known)}")
        require(name not in chosen, f"{option}={name}: is there twice")
        chosen.append(name)
    return chosen


def listed(words: Collection[str], limit: int = 20) -> str:
    """Return words with commas between them, and of many words the first ones."""
    more = f", … ({len(words)} in all)" if len(words) > limit else ""
    return ", ".join(list(words)[:limit]) + more


def announce(line: str) -> None:
    """Print what is left out or guessed; in Python, where a run may be silent, it is a warning."""
    if IN_PYTHON.get():
        warnings.warn(line, stacklevel=2)
    else:
        print(line)


def hint(option: str, value: str | list[str]) -> str:
    """Return an option as it is typed, on the command line or in Python."""
    if IN_PYTHON.get():
        return f"{option}={value!r}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shlex.quote(f"dataset.{option}={text}")


def read_table(path: Path, names: list[str] | None = None) -> pl.DataFrame:
    """Read a file of READERS; columns without names are called `names`, or column_0, …."""
    ending = path.suffix.lower()
    require(ending in READERS, f"path={path}: must end in one of {', '.join(READERS)}")
    require(path.is_file(), f"path={path}: there is no such file")
    try:
        rows = READERS[ending](path)
    except Exception as error:  # whatever a reader makes of a file that is not what its name says
        raise InputError(f"path={path}: cannot be read ({one_line(error)[:200]})") from None
    frame = as_frame(rows, names, f"path={path}")
    require(len(frame) > 0, f"path={path}: holds no rows")
    return frame


def read_text(path: Path) -> pl.DataFrame | np.ndarray:
    """Read CSV or TSV as text: an array if it has no header, whose columns have no names."""
    text = decode(path)
    lines = [re.sub('"[^"]*"', "", line) for line in text.split("\n")[:20] if line]
    counts = {character: {line.count(character) for line in lines} for character in ";\t|"}
    # The separator is in each of the first lines equally often.
    separator = next((c for c, n in counts.items() if len(n) == 1 and n != {0}), ",")
    try:
        frame = pl.read_csv(
            text.encode(), has_header=False, infer_schema_length=0, separator=separator
        )
    except pl.exceptions.ComputeError as error:
        longer = "a row has more cells than the first row" if "more fields" in str(error) else error
        raise ValueError(longer) from None
    frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))  # empty lines
    if separator == ";":
        american = pl.all().str.replace_all(".", "", literal=True).str.replace(",", ".")
        frame = frame.with_columns(
            pl.when(pl.all().str.contains(DECIMAL_COMMA)).then(american).otherwise(pl.all())
        )
    header = [(name or "").strip() for name in frame.row(0)]
    if not is_header(frame):
        announce(f"{path}: has no header: its first row holds {listed(header, 5)}")
        return frame.to_numpy()
    return frame[1:].rename(dict(zip(frame.columns, header, strict=True)))


def decode(path: Path) -> str:
    """Return the text of a file with "\\n" at the ends of its lines."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        announce(f"{path}: is not UTF-8: its letters are read as Windows' cp1252")
        text = content.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_header(frame: pl.DataFrame) -> bool:
    """Whether the first row of a file holds names.

    Numbers alone are none, unless they count, as years do. Nor are numbers beside text that is
    repeated in its column.
    """
    values = to_numbers(pl.Series(frame.row(0)).str.strip_chars())
    numbers = values.drop_nulls()
    if len(numbers) == frame.width:
        return frame.width > 1 and (numbers.diff()[1:] == 1).all()
    text = frame[:, values.is_null().arg_true().to_list()]
    return len(numbers) == 0 or not any(column.is_duplicated()[0] for column in text)


READERS = {
    ".csv": read_text,
    ".tsv": read_text,
    ".parquet": pl.read_parquet,
    ".arrow": pl.read_ipc,
    ".npy": np.load,
}


def as_frame(rows: Any, names: list[str] | None = None, where: str = "rows") -> pl.DataFrame:
    """Return a table as a DataFrame: its text as numbers or booleans where all of it is.

    Args:
        rows: a DataFrame of polars or pandas, whose index is left out; a table of pyarrow; a
            dictionary of columns; or an array or tensor (N, d).
        names: of the columns of an array; None: column_0, column_1, ….
        where: what an error names.
    """
    if hasattr(rows, "to_pydict"):  # of pyarrow
        rows = pl.DataFrame(rows)
    if isinstance(rows, pl.DataFrame):
        rows = rows.to_dict()
    if not hasattr(rows, "items"):  # which pandas and dictionaries have
        array = as_array(rows)
        require(array.ndim == 2, f"{where}: are {array.shape}; must be (N, d)")
        default = [f"column_{i}" for i in range(array.shape[1])]
        names = default if names is None or set(names) <= set(default) else names
        right = f"must have {len(names)}: {listed(names)}"
        require(array.shape[1] == len(names), f"{where}: {array.shape[1]} columns; {right}")
        rows = dict(zip(names, array.T, strict=True))
    columns: dict[str, pl.Series] = {}
    for name, values in rows.items():
        name = str(name).strip()
        require(name not in columns, f"{where}: two columns have the name {name}")
        columns[name] = to_column(values)
    lengths = {len(column) for column in columns.values()}
    require(len(lengths) == 1, f"{where}: must hold columns of one length, not {sorted(lengths)}")
    return pl.DataFrame(columns)


def to_column(values: Any) -> pl.Series:
    """Return a column: text as whole numbers, numbers or booleans if all of it is."""
    if not isinstance(values, pl.Series) or values.dtype == pl.Object:
        array = as_array(values)
        array = array if array.dtype.kind in "biufMm" else list(map(str, array.tolist()))
        values = pl.Series(array)
    if values.dtype in (pl.String, pl.Categorical, pl.Enum):
        values = values.cast(pl.String).str.strip_chars()
        values = values.set(values.str.to_lowercase().is_in(MISSING_VALUES), None)
    if values.count() == 0:
        return values.cast(pl.Null)
    if values.dtype != pl.String:
        return values
    lower = values.str.to_lowercase()
    if lower.is_in(["true", "false"]).all():
        return lower == "true"
    parsed = (values.cast(pl.Int64, strict=False), to_numbers(values))
    return next((each for each in parsed if each.null_count() == values.null_count()), values)


def to_numbers(text: pl.Series) -> pl.Series:
    """Return what people mean by text as numbers, such as $5, 5 % and 1,234.5; null: no number."""
    signs = text.str.extract(f"({SIGN})").fill_null("")
    sign = "".join(signs.filter(text.is_not_null()).mode().sort()[-1:])
    plain = text.str.replace("−", "-", literal=True)
    plain = plain.str.replace(rf"^([+-]?)\s*{re.escape(sign)}\s*|\s*{re.escape(sign)}$", "$1")
    grouped = plain.str.contains(THOUSANDS).fill_null(False)
    plain = plain.zip_with(~grouped, plain.str.replace_all(r"[,'’\s]", ""))
    return plain.set(signs != sign, None).cast(pl.Float64, strict=False)


def numbers(frame: pl.DataFrame, names: list[str], where: str) -> pl.DataFrame:
    """Return columns as float64; a cell that holds no number is an InputError."""
    for column in frame[names]:
        if column.dtype == pl.String:
            row = (to_numbers(column).is_null() & column.is_not_null()).arg_true()[0]
            alone = to_numbers(column[row : row + 1])[0]
            wrong = "no number" if alone is None else "with another sign than other cells"
            raise InputError(f"{where}: {column.name} is {column[row][:40]} in row {row}, {wrong}")
        fits = column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)
        require(fits, f"{where}: {column.name} holds {column.dtype}, not numbers")
    return frame.select(pl.col(names).cast(pl.Float64))
