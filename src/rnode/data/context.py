"""How the values on which a density is conditioned become numbers: p(x | c)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnode.data.splits import Splits
from rnode.errors import InputError, require


class Numeric(NamedTuple):
    """A column of numbers, standardized by the training split."""

    mean: float
    std: float

    size = 1

    def encode(self, name: str, values: np.ndarray) -> Tensor:
        try:
            numbers = torch.from_numpy(np.array(values, dtype=np.float64))
        except (TypeError, ValueError):
            raise InputError(f"context.{name}={values[0]}: must be a number") from None
        require(bool(numbers.isfinite().all()), f"context.{name}: must be finite numbers")
        return ((numbers - self.mean) / self.std)[:, None].float()


class Label(NamedTuple):
    """A column of labels, each a unit vector: a layer's weights for it are its embedding."""

    classes: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.classes)

    def encode(self, name: str, values: np.ndarray) -> Tensor:
        place = {label: i for i, label in enumerate(self.classes)}
        unknown = next((v for v in map(str, values) if v not in place), None)
        known = ", ".join(self.classes[:20]) + ", …" * (self.size > 20)
        require(unknown is None, f"context.{name}={unknown}: must be one of {known}")
        index = torch.tensor([place[str(v)] for v in values], dtype=torch.long)
        return torch.nn.functional.one_hot(index, self.size).float()


class Context:
    """The columns of c by their names, and how they become vectors (N, size)."""

    def __init__(self, columns: Mapping[str, Numeric | Label]):
        self.columns = dict(columns)

    @classmethod
    def fit(cls, columns: Mapping[str, Sequence | np.ndarray]) -> "Context":
        """Numbers with a fraction, or in more than 100 values, are numeric; others are labels."""
        return cls({name: fit_column(name, np.asarray(v)) for name, v in columns.items()})

    @property
    def size(self) -> int:
        return sum(column.size for column in self.columns.values())

    def encode(self, columns: Mapping[str, Sequence | np.ndarray]) -> Tensor:
        """Columns of N values each, by name → (N, size)."""
        missing = [name for name in self.columns if name not in columns]
        require(not missing, f"context.{', context.'.join(missing)}: must be given")
        parts = [c.encode(name, np.asarray(columns[name])) for name, c in self.columns.items()]
        return torch.cat(parts, dim=1)

    def state(self) -> dict[str, Any]:
        """Plain containers, from which `from_state` makes this object."""
        return {name: column._asdict() for name, column in self.columns.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Any]]) -> "Context":
        kinds = {name: Label if "classes" in kept else Numeric for name, kept in state.items()}
        return cls({name: kinds[name](**kept) for name, kept in state.items()})


def fit_column(name: str, values: np.ndarray) -> Numeric | Label:
    """Choose how a column is encoded, from its values in the training split."""
    few = len(np.unique(values)) <= 100
    whole = values.dtype.kind in "iub"
    if values.dtype.kind in "OUS" or (whole and few):
        require(few, f"context {name}: has more than 100 different labels")
        return as_label(values)
    std = float(np.std(values.astype(np.float64)))
    require(std > 0, f"context {name}: is constant in the training split")
    return Numeric(float(np.mean(values)), std)


def as_label(values: np.ndarray) -> Label:
    """The labels that occur in a column: numbers by their size, words by the alphabet."""
    whole = values.dtype.kind in "iub"
    return Label(tuple(sorted({str(v) for v in values}, key=lambda v: (len(v) * whole, v))))


def label_contexts(splits: Splits, labels: Sequence[np.ndarray]) -> Splits:
    """Condition each split on its labels, one an image."""
    context = Context({"label": as_label(np.concatenate(labels))})
    encoded = tuple(context.encode({"label": part}) for part in labels)
    return splits._replace(contexts=encoded, context=context)
