"""The three splits of a data set."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnode.data.conditions import Conditions, Label
from rnode.errors import require
from rnode.evaluation import systematic
from rnode.transforms import ImageTransform, TableTransform, Transform

SPLIT_SEED = 0  # the same samples are held out whatever the seed of the run
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLIT_WORDS |= {"validation": "val", "dev": "val", "test": "test", "testing": "test"}
UNCONDITIONAL = Conditions({})
FIT_ROWS = 10_000_000  # rows of weighted ones to which a transform is fitted, at most
HASH_BYTES = 2**31  # of a split: larger ones are memory-mapped, and reading them takes minutes


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
    columns: Sequence[Mapping[str, Any]] = ({}, {}, {})  # by name, of each split
    weights: Sequence[Tensor] | None = None  # positive (N,), of each split; None: all are 1
    fitted: bool = True  # whether the transform and the conditions are; or `fit` must be called

    def __post_init__(self):
        if self.fitted:
            self.encode(self.transform, self.conditions)

    def fit(self) -> "Splits":
        """Fit the transform and the conditions to the training split."""
        if not self.fitted:
            train = self.train if self.weights is None else self.train[self.represent(FIT_ROWS)]
            self.encode(self.transform.fit(train), Conditions.fit(self.columns[0]))
        return self

    def encode(self, transform: Transform, conditions: Conditions) -> None:
        """Use this transform, and the conditions for c."""
        self.transform, self.conditions = transform, conditions
        self.c = {}
        for name, x, values in zip(SPLIT_NAMES, self.parts, self.columns, strict=True):
            require(len(x) > 0, f"the {name} split is empty")
            if isinstance(transform, TableTransform) and isinstance(x, Tensor):
                transform.require_inside(x)
            self.c[name] = conditions.encode(values, len(x))

    @property
    def parts(self) -> tuple[Any, Tensor, Tensor]:
        """The samples of the three splits."""
        return self.train, self.val, self.test

    def weights_of(self, split: str) -> Tensor:
        """The weights of the samples of a split, float64 (N,), divided by their mean."""
        i = list(SPLIT_NAMES).index(split)
        if self.weights is None:
            return torch.ones(len(self.parts[i]), dtype=torch.float64)
        return self.weights[i] / self.weights[i].mean()

    def represent(self, most: int) -> Tensor:
        """Indices of at most so many training samples, each as often as its weight says.

        Weights that are whole numbers count the samples: there are as many indices.
        """
        n = len(self.train)
        total = n if self.weights is None else max(n, round(float(self.weights[0].sum())))
        return systematic(self.weights_of("train"), min(most, total))

    def hashes(self) -> dict[str, Tensor] | None:
        """Return a hash (N,) of each sample's bytes; None for samples drawn afresh, or too many."""
        if not all(isinstance(x, Tensor) and x.nbytes < HASH_BYTES for x in self.parts):
            return None
        return {name: hash_rows(x) for name, x in zip(SPLIT_NAMES, self.parts, strict=True)}

    def restore(self, known: Mapping[str, Tensor]) -> None:
        """Move each sample whose hash is in `known` to the split that has it there."""
        x = torch.cat(self.parts)
        hashes = hash_rows(x)
        here = np.repeat(range(3), [len(part) for part in self.parts])
        for i, name in reversed(list(enumerate(SPLIT_NAMES))):  # training is the last word
            here[np.isin(hashes, known[name])] = i
        columns = {k: np.concatenate([v[k] for v in self.columns]) for k in self.columns[0]}
        places = [np.flatnonzero(here == i) for i in range(3)]
        self.train, self.val, self.test = (x[place] for place in places)
        self.columns = [{k: v[place] for k, v in columns.items()} for place in places]
        if self.weights is not None:
            weights = torch.cat(list(self.weights))
            self.weights = [weights[place] for place in places]
        self.encode(self.transform, self.conditions)


def hash_rows(x: Tensor) -> Tensor:
    """Return a 64-bit hash of each sample's bytes, (N,)."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in x.numpy())
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())


def image_splits(
    images: Mapping[str, Tensor],
    labels: Mapping[str, np.ndarray],
    levels: int = 256,
    alpha: float = 0.05,
    validation: float = 0.1,
    test: float = 0.1,
    context: str | None = None,
) -> Splits:
    """Return images of so many grey levels; `context=label` conditions them on their labels.

    Splits that are missing are cut off by `hold_out`. α is that of the logit transform. The label
    of an image that has none is "".
    """
    parts = hold_out(images, validation, test)
    x = [parts[name] for name in SPLIT_NAMES]
    transform = ImageTransform(levels, alpha)
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
            require(n > 1, f"{n} sample is too few to hold a {name} split out")
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
