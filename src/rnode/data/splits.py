"""The three splits of a data set."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rnode.errors import require

SPLIT_SEED = 0  # the same samples are held out whatever the seed of the run


class Splits(NamedTuple):
    """The samples of each split and, for conditional densities, what each is conditioned on."""

    train: Tensor | Dataset  # images, uint8 (N, C, H, W), or vectors, float (N, d)
    val: Tensor
    test: Tensor
    contexts: tuple[Tensor, Tensor, Tensor] | None = None  # of each split, float (N, k)
    context: Any = None  # the rnode.data.context.Context that has encoded them
    transform: Any = None  # the rnode.transforms.TableTransform of a table


def hold_out(rows: Tensor, count: int, what: str) -> tuple[Tensor, Tensor]:
    """Split `rows` into all but `count` of them and those; `what` names the count in an error."""
    rest, held = hold_out_indices(len(rows), count, what)
    return rows[rest], rows[held]


def hold_out_indices(n: int, count: int, what: str) -> tuple[Tensor, Tensor]:
    """Split the indices of `n` samples as `hold_out` does, by a permutation that never changes."""
    require(0 < count < n, f"{what}={count}: must be 1 to {n - 1}, out of {n} samples")
    order = permutation(n)
    return order[count:], order[:count]


def permutation(n: int) -> Tensor:
    """Return a permutation of 0 to n − 1 that never changes."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))


def count_of(share: float, n: int) -> int:
    """A share below 1 of `n` samples, one at least, or a number of samples."""
    return max(1, round(share * n)) if share < 1 else int(share)
