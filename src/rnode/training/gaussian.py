"""The baseline of every run: the likelihood of one Gaussian."""

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

FIT, EVALUATE = 50_000, 10_000  # samples at most
MAX_DIMENSIONS = 4096  # beyond, the covariance would cost minutes
CHUNK = 2000


class GaussianBaseline(Callback):
    """Logs val/bits_per_dim_gaussian: validation bits/dim of a Gaussian with full covariance."""

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        bits = gaussian_bits(trainer.datamodule, module.seed) if trainer.is_global_zero else None
        self.bits: float | None = trainer.strategy.broadcast(bits)
        if self.bits is not None:
            trainer.print(
                f"a Gaussian with full covariance has {self.bits:.4f} validation bits/dim"
            )

    def on_validation_epoch_end(self, trainer: Trainer, module: RNODE) -> None:
        if self.bits is not None:
            self.log(GAUSSIAN, self.bits)


@torch.no_grad()
def gaussian_bits(data: DataModule, seed: int) -> float | None:
    """Fit a Gaussian to the training data as a flow sees them, and measure the validation data.

    Its mean is linear in c, for a density of x given c. None is returned if the data have too few
    samples or too many dimensions.
    """
    if math.prod(data.shape) > MAX_DIMENSIONS:
        return None
    generator = torch.Generator().manual_seed(seed)
    count, moments = 0, 0.0
    for index in evenly_spaced(data.splits.train, FIT):
        x, index, c = data.fetch("train", index)
        ones_c, y = design(data.transform(x, index, c, generator=generator))
        rows = torch.cat([ones_c, y], 1)
        count, moments = count + len(rows), moments + rows.T @ rows
    k, d = ones_c.shape[1], y.shape[1]
    weights = torch.linalg.pinv(moments[:k, :k]) @ moments[:k, k:]  # least squares
    covariance = (moments[k:, k:] - moments[k:, :k] @ weights) / count
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or count <= k + d:
        return None
    gaussian, bits = MultivariateNormal(y.new_zeros(d), scale_tril=factor), []
    for index in evenly_spaced(data.splits.val, EVALUATE):
        batch = data.transform.for_evaluation(*data.fetch("val", index), seed)
        ones_c, y = design(batch)
        log_prob = gaussian.log_prob(y - ones_c @ weights)
        bits.append(bits_per_dim(log_prob, batch.log_det, d))
    return float(torch.cat(bits).mean())


def design(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return 1 and c, (B, 1 + k), and y (B, d), in float64."""
    y = batch.y.flatten(1).double()
    return torch.cat([y.new_ones(len(y), 1), batch.c.double()], 1), y


def evenly_spaced(rows, most: int) -> tuple[Tensor, ...]:
    """Indices of at most `most` rows, evenly spaced, in chunks."""
    return torch.linspace(0, len(rows) - 1, min(most, len(rows))).long().split(CHUNK)
