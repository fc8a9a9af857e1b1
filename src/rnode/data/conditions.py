"""The encoder of the columns on which a density is conditioned: their values to c, p(x | c)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnode.errors import InputError, require

LABEL_LIMIT = 100  # different labels of a column of a table
ROWS_PER_LABEL = 10  # on average: with fewer, held-out rows may have labels of no training row


class Numeric(NamedTuple):
    """A column of numbers, standardized by the training split."""

    mean: float
    std: float

    size = 1  # of its part of c

    def encode(self, name: str, values: np.ndarray) -> Tensor:
        """Values (N,) → (N, 1)."""
        try:
            numbers = torch.from_numpy(values.astype(np.float64))
        except (TypeError, ValueError):
            raise InputError(f"context.{name}={values[0]}: must be a number") from None
        require(bool(numbers.isfinite().all()), f"context.{name}: must be finite numbers")
        return ((numbers - self.mean) / self.std)[:, None].float()


class Label(NamedTuple):
    """A column of labels, each a unit vector: a layer's weights for it are its embedding."""

    classes: tuple[str, ...]  # numbers in ascending order, words in alphabetical order

    @property
    def size(self) -> int:
        return len(self.classes)

    @classmethod
    def fit(cls, values: np.ndarray) -> "Label":
        return cls(tuple(map(label_of, np.unique(values).tolist())))

    def encode(self, name: str, values: np.ndarray) -> Tensor:
        """Values (N,) → (N, size)."""
        place = {label: i for i, label in enumerate(self.classes)}
        index = [place.get(label_of(value), -1) for value in values]
        if -1 in index:
            known = ", ".join(self.classes[:20])
            raise InputError(f"context.{name}={values[index.index(-1)]}: must be one of {known}")
        return torch.eye(self.size)[index]


class Conditions:
    """The columns of c by their names; without columns, c is (N, 0)."""

    def __init__(self, columns: Mapping[str, Numeric | Label]):
        self.columns = dict(columns)

    @classmethod
    def fit(cls, columns: Mapping[str, np.ndarray]) -> "Conditions":
        """Choose how each column is encoded, from its values in the training split."""
        return cls({name: fit_column(name, values) for name, values in columns.items()})

    @property
    def size(self) -> int:
        """k, the number of conditions."""
        return sum(column.size for column in self.columns.values())

    def encode(self, values: Mapping[str, Any], n: int) -> Tensor:
        """Encode what `n` samples are conditioned on: columns of `n` values, or of one → (n, k)."""
        wrong = [name for name in self.columns if name not in values]
        wrong += [name for name in values if name not in self.columns]
        known = ", ".join(self.columns) or "none"
        require(not wrong, f"context.{', context.'.join(wrong)}: the conditions are {known}")
        parts = [torch.empty(n, 0)]
        for name, column in self.columns.items():
            array = np.atleast_1d(as_array(values[name]))
            fits = len(array) in (1, n)
            require(fits, f"context.{name}: has {len(array)} values for {n} samples")
            parts.append(column.encode(name, np.broadcast_to(array, n)))
        return torch.cat(parts, dim=1)

    def state(self) -> dict[str, Any]:
        """Plain containers, from which `from_state` makes this object."""
        return {name: column._asdict() for name, column in self.columns.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Any]]) -> "Conditions":
        return cls({k: (Label if "classes" in v else Numeric)(**v) for k, v in state.items()})


def as_array(values: Any) -> np.ndarray:
    """Return values of any array library; masked ones are missing, NaN."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    if isinstance(values, np.ma.MaskedArray):
        values = values.astype(np.float64).filled(np.nan)
    array = np.asarray(values)
    return array.astype(np.float64) if array.dtype.char in "eg" else array  # half and long double


def label_of(value: Any) -> str:
    """Return the label of a value: 2.0 is the label 2."""
    integer = isinstance(value, float) and value.is_integer()
    return str(int(value) if integer else value)


def fit_column(name: str, values: np.ndarray) -> Numeric | Label:
    """Words are labels, and so are whole numbers that repeat; other numbers are numeric."""
    words = values.dtype.kind in "OUS"
    different = len(np.unique(values))
    few = different <= LABEL_LIMIT
    require(few or not words, f"context {name}: has more than {LABEL_LIMIT} different labels")
    repeated = few and ROWS_PER_LABEL * different <= len(values)
    if words or values.dtype.kind == "b" or (repeated and values.dtype.kind in "iu"):
        return Label.fit(values)
    std = float(np.std(values.astype(np.float64)))
    require(std > 0, f"context {name}: is constant in the training split")
    return Numeric(float(np.mean(values)), std)
