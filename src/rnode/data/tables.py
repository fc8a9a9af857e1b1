"""Tables as columns of numbers and labels: files, DataFrames, dictionaries and arrays."""

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
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

MISSING = ["", "-", "--", "?", ".", "na", "n/a", "#n/a", "<na>", "nan", "nat", "none", "null"]
SIGN = "[$€£¥%]"  # of money or per cent: all cells of a column have the same, or none has one
GROUPED = r"^[+-]?\d{1,3}([, '\u00a0\u202f]\d{3})+(\.\d*)?$"  # such as 1,234.5
DECIMAL_COMMA = rf"^{SIGN}? ?[+-]?[\d.]*,\d+ ?{SIGN}?$"  # in a file with semicolons
NAMELESS = r"|Unnamed: \d+|__index_level_\d+__"  # what files hold for the index of pandas
REPETITION_LIMIT = 0.01  # share of the rows above which a repeated value is worth a warning
IN_PYTHON: ContextVar[bool] = ContextVar("IN_PYTHON", default=False)  # how `hint` names options

Names = Sequence[str | float | bool | None]  # a command line reads the name 2019 as a number


@dataclass(frozen=True)
class Table:
    """A table, and how it is modelled."""

    path: str  # the file; its ending says its format
    columns: Names | None = None  # that are modelled; None: all numeric ones but `context`
    context: Names | None = None  # columns on which the density is conditioned
    integer: Names | None = None  # columns of whole numbers, which are dequantized
    log: Names | None = None  # positive columns whose logarithm is modelled
    logit: Mapping[str, Sequence[float]] | None = None  # {name: [low, high]}: the logit is modelled
    missing: str = "stop"  # at a row with a missing or infinite value, or `drop` the row
    split_column: str | None = None  # says train, val or test; None: `hold_out` cuts two splits off
    validation: float = 0.1  # a share of all rows, below 1, or a number of rows
    test: float = 0.1  # likewise

    @property
    def name(self) -> str:
        return Path(self.path).name

    def splits(self) -> Splits:
        """Return the modelled columns, float64 (N, d), and those of the conditions."""
        frame = read_table(Path(self.path).expanduser())
        split = [] if self.split_column is None else [self.split_column]
        split = choose("split_column", split, frame.columns)
        context = choose("context", self.context, frame.columns)
        names = choose("columns", self.columns, frame.columns)
        names = names or self.numeric(frame.drop(context, split))
        both = [name for name in names if name in [*context, *split]]
        require(not both, f"{listed(both)}: is modelled, and context or split_column names it too")
        for name in context:
            fits = frame[name].dtype in (pl.String, pl.Boolean) or kind(frame[name]) == "numbers"
            require(fits, f"context={name}: holds {kind(frame[name])}, not numbers or labels")
        x = numbers(frame, names, self.name)
        self.report(frame, names, [*context, *split])
        frame = self.complete(frame.with_columns(x), [*names, *context])
        require(len(frame) > 3, f"{self.name}: {len(frame)} rows are too few")
        integer = choose("integer", self.integer, names)
        self.warn(frame[names], integer)
        columns = self.columns_of(names, integer)
        parts = hold_out(self.parts(frame, split), count_of(self.validation, len(frame)), self.test)
        rows = torch.from_numpy(frame[names].to_numpy() + 0.0)  # −0 is 0
        train, val, test = (rows[parts[split]] for split in SPLIT_NAMES)
        given = {name: frame[name].to_numpy() for name in context}
        values = [{k: v[parts[split]] for k, v in given.items()} for split in SPLIT_NAMES]
        return Splits(train, val, test, TableTransform(columns), columns=values, fitted=False)

    def numeric(self, frame: pl.DataFrame) -> list[str]:
        """Return the columns of numbers; some other text among the numbers of one is an error."""
        named = [column for column in frame if not re.fullmatch(NAMELESS, column.name)]
        for column in named:
            if column.dtype == pl.String and 2 * to_numbers(column).count() > column.count():
                numbers(frame, [column.name], self.name)
        names = [column.name for column in named if kind(column) == "numbers"]
        held = listed([f"{column.name}: {kind(column)}" for column in frame])
        require(bool(names), f"{self.name}: has no numeric column to model ({held})")
        return names

    def columns_of(self, names: list[str], integer: list[str]) -> list[Column]:
        """Return what becomes of each modelled column, before it is fitted."""
        logit = choose("logit", self.logit, names)
        log = choose("log", self.log, [name for name in names if name not in logit])
        bounds = {}
        for name, (low, high) in zip(logit, (self.logit or {}).values(), strict=True):
            bounds[name] = (float(low), float(high) + (name in integer))  # x + noise is below x + 1
        return [Column(name, name in integer, name in log, bounds.get(name)) for name in names]

    def report(self, frame: pl.DataFrame, names: list[str], given: list[str]) -> None:
        """Print what was read, and which columns are left out and why."""
        others = [f"{c.name or 'no name'} ({kind(c)})" for c in frame.drop(names, given)]
        parts = {"modelled": names, "given": given, "left out": others}
        words = "; ".join(f"{word}: {listed(part)}" for word, part in parts.items() if part)
        print(f"{self.name}: {len(frame)} rows; {words}")

    def complete(self, frame: pl.DataFrame, names: list[str]) -> pl.DataFrame:
        """Return the rows without missing and infinite values in the columns `names`."""
        floats = cs.by_name(names) & cs.float()
        frame = frame.with_columns(pl.when(floats.is_finite()).then(floats))
        counts = {name: count for name in names if (count := frame[name].null_count())}
        if not counts:
            return frame
        words = listed([f"{name} ({count})" for name, count in counts.items()])
        message = f"{self.name}: values are missing or infinite in {words}; "
        require(self.missing == "drop", f"{message}{hint('missing', 'drop')} leaves the rows out")
        rest = frame.drop_nulls(names)
        print(f"{message}{len(frame) - len(rest)} of {len(frame)} rows are left out")
        return rest

    def parts(self, frame: pl.DataFrame, split: list[str]) -> dict[str, np.ndarray]:
        """Return the indices of the rows of each split that the column `split` names."""
        if not split:
            return {"train": np.arange(len(frame))}
        words = frame[split[0]].cast(pl.String).str.to_lowercase().to_list()
        other = sorted(set(map(str, words)) - SPLIT_WORDS.keys())[:3]
        message = f"split_column={split[0]}: holds {other}, not train, val and test"
        require(not other, message)
        splits = np.array([SPLIT_WORDS[word] for word in words])
        parts = {name: (splits == name).nonzero()[0] for name in SPLIT_NAMES}
        # A validation may take the first rows alone, and a file may be sorted.
        parts["val"] = parts["val"][permutation(len(parts["val"]))]
        return {name: part for name, part in parts.items() if len(part) or name == "train"}

    def warn(self, frame: pl.DataFrame, integer: list[str]) -> None:
        """Print the columns whose likelihood is misleading: whole numbers and repeated values."""
        if self.integer is None:
            varying = [column for column in frame if column.min() < column.max()]
            integer = [column.name for column in varying if (column % 1 == 0).all()]
            if integer:
                words = f"whole numbers in {listed(integer)}, whose density rises without bound"
                print(f"{self.name}: {words}; {hint('integer', integer)} dequantizes them")
        repeated = []
        for column in frame.drop(integer):
            value, count = column.rename("value").value_counts(sort=True, name="count").row(0)
            if count > max(2, REPETITION_LIMIT * len(frame)):
                repeated.append(f"{column.name} ({value:g} in {count} of {len(frame)} rows)")
        if repeated:
            words = f"repeated values, where the density rises without bound: {listed(repeated)}"
            print(f"{self.name}: {words}; add noise as wide as their rounding, or leave them out")


def table(**options: Any) -> Splits:
    """Return the splits of a table; the options are the fields of `Table`."""
    return Table(**options).splits()


def choose(option: str, values: Names | Mapping | None, known: Collection[str]) -> list[str]:
    """Return the columns among `known` that an option names."""
    chosen = []
    for value in values or ():
        plain = isinstance(value, bool) or value is None  # true and null are names too
        word = json.dumps(value) if plain else str(value).strip()
        same = [k for k in known if k == word] or [k for k in known if plain and k.lower() == word]
        require(bool(same), f"{option}={word}: must be among {listed(known)}")
        require(same[0] not in chosen, f"{option}={word}: is there twice")
        chosen.append(same[0])
    return chosen


def listed(words: Collection[str], limit: int = 20) -> str:
    """Return words with commas between them, and of many words the first ones."""
    more = f", … ({len(words)} in all)" if len(words) > limit else ""
    return ", ".join(list(words)[:limit]) + more


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
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    text = text if "\n" in text else text.replace("\r", "\n")
    separator = "\t" if path.suffix.lower() == ".tsv" else find_separator(text)
    frame = pl.read_csv(text.encode(), has_header=False, infer_schema_length=0, separator=separator)
    frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))  # empty lines
    if separator == ";":
        frame = frame.with_columns(pl.all().str.strip_chars())
        commas = [c.name for c in frame if c.slice(1).str.contains(DECIMAL_COMMA).any()]
        plain = pl.col(commas).str.replace_all(".", "", literal=True).str.replace(",", ".")
        number = pl.col(commas).str.contains(r"^[^a-zA-Z]*\d[^a-zA-Z]*$")
        frame = frame.with_columns(pl.when(number).then(plain).otherwise(pl.col(commas)))
    header = [(name or "").strip() for row in frame[:1].rows() for name in row]
    if header and not is_header(frame):
        print(f"{path}: has no header: its first row holds {listed(header, 5)}")
        return frame.to_numpy()
    header[0:1] = [name.removeprefix("#").strip() for name in header[0:1]]  # of numpy.savetxt
    return named(zip(header, frame[1:].get_columns(), strict=True), str(path))


def find_separator(text: str) -> str:
    """Return the character that is in each of the first lines equally often."""
    lines = [re.sub('"[^"]*"', "", line) for line in text[:100_000].splitlines()[:20] if line]
    for separator in ";\t|":
        if len({line.count(separator) for line in lines}) == 1 and separator in lines[0]:
            return separator
    spaces = len({line.strip().count(" ") for line in lines}) == 1 and "," not in "".join(lines)
    return " " if spaces and " " in lines[0].strip() else ","


def is_header(frame: pl.DataFrame) -> bool:
    """Whether the first row of a file holds names.

    Numbers alone are none, unless they count, as years do. Nor are numbers beside text that is
    repeated in its column.
    """
    first = pl.Series(frame.row(0)).str.strip_chars()
    values = to_numbers(first)
    if values.count() == 0:
        return True
    text = [i for i, cell in enumerate(first) if cell and values[i] is None]
    if not text:
        return len(values.drop_nulls()) > 1 and (values.drop_nulls().diff().drop_nulls() == 1).all()
    return not any((frame[:, i].str.strip_chars() == first[i]).sum() > 1 for i in text)


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
    if hasattr(rows, "collect"):  # a LazyFrame
        rows = rows.collect()
    if hasattr(rows, "to_pydict"):  # of pyarrow
        rows = pl.DataFrame(rows)
    if isinstance(rows, pl.DataFrame):
        pairs = [(column.name, column) for column in rows]
    elif hasattr(rows, "iloc"):  # of pandas
        pairs = [(name, rows.iloc[:, i]) for i, name in enumerate(rows.columns)]
    elif isinstance(rows, Mapping):
        pairs = rows.items()
    elif getattr(getattr(rows, "dtype", None), "names", None):
        pairs = [(name, rows[name]) for name in rows.dtype.names]
    else:
        array = as_array(rows)
        array = array[:, None] if array.ndim == 1 else array
        require(array.ndim == 2, f"{where}: are {array.shape}; must be (N, d)")
        names = names or [f"column_{i}" for i in range(array.shape[1])]
        right = f"must have {len(names)}: {listed(names)}"
        require(array.shape[1] == len(names), f"{where}: {array.shape[1]} columns; {right}")
        pairs = zip(names, array.T, strict=True)
    return named([(name, typed(to_series(values))) for name, values in pairs], where)


def named(pairs: Iterable[tuple[Any, pl.Series]], where: str) -> pl.DataFrame:
    """Return columns (N,) by their names, which are text and differ."""
    columns: dict[str, pl.Series] = {}
    for name, values in pairs:
        name = str(name).strip()
        require(name not in columns, f"{where}: two columns have the name {name}")
        columns[name] = values
    lengths = {len(values) for values in columns.values()}
    require(len(lengths) == 1, f"{where}: must hold columns of one length, not {sorted(lengths)}")
    return pl.DataFrame(columns)


def to_series(values: Any) -> pl.Series:
    """Return a column; objects of Python become text."""
    if isinstance(values, pl.Series) and values.dtype != pl.Object:
        return values
    array = as_array(values)
    return pl.Series(array if array.dtype.kind in "biufMm" else list(map(str, array.tolist())))


def typed(column: pl.Series) -> pl.Series:
    """Return text as whole numbers, numbers or booleans if all of it is; the rest as it is."""
    if column.dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype != pl.String:
        return column.cast(pl.Float64) if column.dtype.is_decimal() else column
    text, values = column, column.cast(pl.Float64, strict=False)
    if values.null_count():
        text = column.str.strip_chars()
        text = text.set(text.str.to_lowercase().is_in(MISSING), None)
        values = to_numbers(text)
    if text.count() == 0 or values.count() < text.count():
        booleans = text.str.to_lowercase().is_in(["true", "false"]).all() and text.count() > 0
        return text.str.to_lowercase() == "true" if booleans else text
    exact = (values.abs() < 2**53).all() and not text.str.contains("[.eE]").any()
    return values.cast(pl.Int64) if exact else values


def to_numbers(text: pl.Series) -> pl.Series:
    """Return what people mean by text as numbers, such as $5, 5 % and 1,234.5; null: no number."""
    values = text.cast(pl.Float64, strict=False)
    if values.null_count() == text.null_count():
        return values
    sign = text.str.extract(f"({SIGN})").fill_null("")
    plain = text.str.replace("−", "-").str.replace(rf"^([+-]?) ?{SIGN} ?|\s*{SIGN}$", "$1")
    grouped = plain.str.contains(GROUPED)
    plain = plain.zip_with(~grouped.fill_null(False), plain.str.replace_all(r"[^\d.+-]", ""))
    values = plain.str.strip_chars().cast(pl.Float64, strict=False)
    signs = sign.filter(values.is_not_null()).mode()
    return values.set(sign != signs[0], None) if len(signs) else values


def kind(column: pl.Series) -> str:
    """Say what a column holds."""
    if column.count() == 0:
        return "all values are missing"
    if column.dtype == pl.String:
        return f"text, such as {column.drop_nulls()[0][:40]}"
    if column.dtype == pl.Boolean:
        return "booleans"
    if column.dtype.is_numeric():
        return "numbers"
    return "dates or times" if column.dtype.is_temporal() else str(column.dtype)


def numbers(frame: pl.DataFrame, names: list[str], where: str) -> pl.DataFrame:
    """Return columns as float64; a cell that holds no number is an InputError."""
    for column in frame[names]:
        if column.dtype == pl.String and column.count():
            row = (to_numbers(column).is_null() & column.is_not_null()).arg_true()[0]
            raise InputError(
                f"{where}: {column.name} is {column[row][:40]} in row {row}, no number"
            )
        fits = column.count() == 0 or column.dtype.is_numeric() or column.dtype == pl.Boolean
        require(fits, f"{where}: {column.name} holds {kind(column)}, not numbers")
    return frame.select(pl.col(names).cast(pl.Float64))
