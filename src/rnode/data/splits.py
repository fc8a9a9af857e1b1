"""The three splits of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rnode.data.conditions import Conditions, Label
from rnode.errors import require
from rnode.transforms import ImageTransform, Transform

SPLIT_SEED = 0  # the same samples are held out whatever the seed of the run
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
UNCONDITIONAL = Conditions({})
NO_LABEL = ""
Rows = TypeVar("Rows")


class Splits:
    """The samples of each split, and what they are conditioned on, c (N, k), by split.

    Images are uint8 (N, C, H, W), vectors are float (N, d).
    """

    def __init__(
        self,
        train: Any,  # a tensor, or what returns samples when it is indexed by a tensor (B,)
        val: Tensor,
        test: Tensor,
        transform: Transform,  # of samples to what a flow models
        conditions: Conditions = UNCONDITIONAL,  # the encoder of `columns`
        columns: Sequence[Mapping[str, Any]] = ({}, {}, {}),  # by name, of each split
    ):
        self.train = train
        self.val = val
        self.test = test
        self.transform = transform
        self.conditions = conditions
        parts = zip(SPLIT_NAMES, (train, val, test), columns, strict=True)
        self.c = {name: conditions.encode(values, len(x)) for name, x, values in parts}


@dataclass(frozen=True)
class Labelled:
    """Samples x (N, *shape) and the label of each, (N,), which may be NO_LABEL."""

    x: Tensor
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> "Labelled":
        return Labelled(self.x[index], self.labels[index.numpy()])


def image_splits(
    parts: Mapping[str, Labelled],
    levels: int = 256,
    alpha: float = 0.05,
    validation: float = 0.1,
    test: float = 0.1,
    context: str | None = None,
) -> Splits:
    """Return images of so many grey levels; `context=label` conditions them on their labels.

    Splits that are missing are cut off by `hold_out`. α is that of the logit transform.
    """
    parts = hold_out(parts, validation, test)
    samples = [parts[name] for name in SPLIT_NAMES]
    x = [part.x for part in samples]
    transform = ImageTransform(levels, alpha)
    if context is None:
        return Splits(*x, transform)
    label = Label.fit(np.concatenate([part.labels for part in samples]))
    require(NO_LABEL not in label.classes, "context=label: there are images without a label")
    columns = [{"label": part.labels} for part in samples]
    return Splits(*x, transform, Conditions({"label": label}), columns)


def hold_out(parts: Mapping[str, Rows], validation: float, test: float) -> dict[str, Rows]:
    """Cut the splits that are missing in `parts` off "train", by a permutation that never changes.

    `test` of all samples, then `validation` of the rest: each a share below 1 or a number. A part
    is anything that a tensor of indices can index.
    """
    parts = dict(parts)
    for name, option, share in (("test", "test", test), ("val", "validation", validation)):
        if name not in parts:
            train = parts["train"]
            n = len(train)
            count = count_of(share, n)
            require(0 < count < n, f"{option}={count}: must be 1 to {n - 1}, out of {n} samples")
            order = permutation(n)
            parts["train"] = train[order[count:]]
            parts[name] = train[order[:count]]
    return parts


def count_of(share: float, n: int) -> int:
    """A share below 1 of `n` samples, one at least, or a number of samples."""
    return max(1, round(share * n)) if share < 1 else int(share)


def permutation(n: int) -> Tensor:
    """Return a permutation of 0 to n − 1 that never changes."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
