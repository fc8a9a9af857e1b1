"""The three splits of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnode.data.conditions import Conditions, Label
from rnode.errors import require
from rnode.transforms import ImageTransform, Transform

SPLIT_SEED = 0  # the same samples are held out whatever the seed of the run
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLIT_WORDS |= {"validation": "val", "dev": "val", "test": "test", "testing": "test"}
UNCONDITIONAL = Conditions({})


@dataclass
class Splits:
    """The samples of each split, and what they are conditioned on, c (N, k), by split.

    Images are uint8 (N, C, H, W), vectors are float (N, d).
    """

    train: Any  # a tensor, or what returns samples when it is indexed by a tensor (B,)
    val: Tensor
    test: Tensor
    transform: Transform  # of samples to what a flow models
    conditions: Conditions = UNCONDITIONAL  # the encoder of `columns`
    columns: InitVar[Sequence[Mapping[str, Any]]] = ({}, {}, {})  # by name, of each split

    def __post_init__(self, columns: Sequence[Mapping[str, Any]]):
        parts = zip(SPLIT_NAMES, (self.train, self.val, self.test), columns, strict=True)
        self.c = {name: self.conditions.encode(values, len(x)) for name, x, values in parts}


def image_splits(
    images: Mapping[str, Tensor],
    labels: Mapping[str, np.ndarray],
    levels: int = 256,
    alpha: float = 0.05,
    validation: float = 0.1,
    test: float = 0.1,
    context: str | None = None,
    white: float | None = None,
) -> Splits:
    """Return images of so many grey levels; `context=label` conditions them on their labels.

    Splits that are missing are cut off by `hold_out`. α is that of the logit transform. The label
    of an image that has none is "".
    """
    parts = hold_out(images, validation, test)
    x = [parts[name] for name in SPLIT_NAMES]
    transform = ImageTransform(levels, alpha, white)
    if context is None:
        return Splits(*x, transform)
    label = Label.fit(np.concatenate(list(labels.values())))
    require("" not in label.classes, "context=label: there are images without a label")
    labels = hold_out(labels, validation, test)
    columns = [{"label": labels[name]} for name in SPLIT_NAMES]
    return Splits(*x, transform, Conditions({"label": label}), columns)


def hold_out(parts: Mapping[str, Any], validation: float, test: float) -> dict[str, Any]:
    """Cut the splits that are missing in `parts` off "train", by a permutation that never changes.

    `test` of all samples, then `validation` of the rest: each a share below 1 or a number. The
    parts are tensors or arrays.
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


def permutation(n: int) -> np.ndarray:
    """Return a permutation of 0 to n − 1 that never changes."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
