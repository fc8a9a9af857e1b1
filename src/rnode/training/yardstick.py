"""The likelihood of one Gaussian: a flow that has learned anything has a better one."""

import math

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torch.distributions import MultivariateNormal

from rnode.data.datamodule import DataModule
from rnode.loss import bits_per_dim
from rnode.training.module import RNODE
from rnode.training.results import GAUSSIAN
from rnode.transforms import Batch

TRAINED, MEASURED = 50_000, 10_000  # samples at most
WIDEST = 4096  # dimensions: beyond, the covariance would cost minutes
CHUNK = 2000


class Yardstick(Callback):
    """Logs val/bits_per_dim_gaussian: validation bits/dim of a Gaussian with full covariance."""

    def __init__(self):
        self.bits: float | None = None

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        bits = gaussian_bits(trainer.datamodule, module.seed) if trainer.is_global_zero else None
        self.bits = trainer.strategy.broadcast(bits)
        if self.bits is not None:
            trainer.print(
                f"a Gaussian with full covariance has {self.bits:.4f} validation bits/dim"
            )

    def on_validation_epoch_end(self, trainer: Trainer, module: RNODE) -> None:
        if self.bits is not None:
            module.log(GAUSSIAN, self.bits)


@torch.no_grad()
def gaussian_bits(data: DataModule, seed: int) -> float | None:
    """Fit a Gaussian to the training data as a flow sees them, and measure the validation data.

    Its mean is constant, or linear in c for a density of x given c. None is returned if the data
    have too few samples or too many dimensions.
    """
    if math.prod(data.shape) > WIDEST:
        return None
    generator = torch.Generator().manual_seed(seed)
    count, moments = 0, 0.0
    for index in chunks(data.splits.train, TRAINED):
        x, index, c = data.fetch_from("train")(index.tolist())
        noise = torch.rand(x.shape, generator=generator)
        given, y = design(data.transform(x, index, c, noise))
        rows = torch.cat([given, y], 1)
        count, moments = count + len(rows), moments + rows.T @ rows
    k, d = given.shape[1], y.shape[1]
    weights = torch.linalg.pinv(moments[:k, :k]) @ moments[:k, k:]  # least squares
    covariance = (moments[k:, k:] - moments[k:, :k] @ weights) / count
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or count <= k + d:
        return None
    gaussian, bits = MultivariateNormal(y.new_zeros(d), scale_tril=factor), []
    for index in chunks(data.splits.val, MEASURED):
        batch = data.evaluation_batch("val", index, seed)
        given, y = design(batch)
        log_prob = gaussian.log_prob(y - given @ weights)
        bits.append(bits_per_dim(log_prob, batch.log_det, d))
    return float(torch.cat(bits).mean())


def design(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return 1 and c (B, 1 + k), and y (B, d)."""
    y = batch.y.flatten(1).double()
    ones = y.new_ones(len(y), 1)
    return torch.cat([ones, batch.c.double()], 1), y


def chunks(rows, most: int) -> tuple[Tensor, ...]:
    """Indices of at most `most` rows, evenly spaced."""
    return torch.linspace(0, len(rows) - 1, min(most, len(rows))).long().split(CHUNK)
