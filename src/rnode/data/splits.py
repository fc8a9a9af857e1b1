"""The three splits of a data set."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rnode.errors import require

SPLIT_SEED = 0  # the same samples are held out whatever the seed of the run


class Splits(NamedTuple):
    train: Tensor | Dataset  # images, uint8 (N, C, H, W), or vectors, float (N, d)
    val: Tensor
    test: Tensor


def hold_out(rows: Tensor, count: int, what: str) -> tuple[Tensor, Tensor]:
    """Split `rows` into all but `count` of them and those; `what` names the count in an error."""
    most = len(rows) - 1
    require(0 < count <= most, f"{what}={count}: must be 1 to {most}, out of {len(rows)} samples")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return rows[order[count:]], rows[order[:count]]
