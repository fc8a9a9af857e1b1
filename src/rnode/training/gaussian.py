"""The baseline of every run: the likelihood of one Gaussian."""

import math

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from sklearn.covariance import ledoit_wolf
from torch.distributions import MultivariateNormal

from rnode.data.datamodule import DataModule
from rnode.loss import bits_per_dim
from rnode.training.module import RNODE
from rnode.training.results import GAUSSIAN

NUMBERS = 20_000_000  # in the training samples, at most
MAX_DIMENSIONS = 4096  # beyond, the covariance would cost minutes


class GaussianBaseline(Callback):
    """Logs val/bits_per_dim_gaussian, of the samples on which the flow is validated."""

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        data, limit = trainer.datamodule, trainer.limit_val_batches
        size = data.eval_batch_size * trainer.world_size
        batches = math.ceil(len(data.splits.val) / size)  # which Lightning counts, not rows
        batches = int(limit * batches) if isinstance(limit, float) else min(limit, batches)
        rows = min(size * batches, len(data.splits.val))
        bits = gaussian_bits(data, rows, data.seed) if trainer.is_global_zero else None
        self.bits: float | None = trainer.strategy.broadcast(bits)
        if bits is not None:
            print(f"a Gaussian with full covariance has {bits:.4f} validation bits/dim")

    def on_validation_epoch_end(self, *_) -> None:
        if self.bits is not None:
            self.log(GAUSSIAN, self.bits, sync_dist=True)


@torch.no_grad()
def gaussian_bits(data: DataModule, rows: int, seed: int) -> float | None:
    """Fit a Gaussian, whose mean is linear in c, to the training data as a flow sees them.

    Its covariance is shrunk as Ledoit and Wolf (2004) do, so that few samples are enough.

    Returns:
        Bits/dim of the first `rows` of the validation data; None if the data are too large, or do
        not vary.
    """
    d = math.prod(data.shape)
    count = min(NUMBERS // d, len(data.splits.train))
    if d > MAX_DIMENSIONS or rows == 0:
        return None
    index = torch.linspace(0, len(data.splits.train) - 1, count).long().tolist()
    generator = torch.Generator().manual_seed(seed)
    batch = data.transform(*data.fetch("train", index), generator=generator)
    y = batch.y.flatten(1).double()
    c = F.pad(batch.c.double(), (1, 0), value=1.0)
    weights = torch.linalg.lstsq(c, y).solution
    y = y - c @ weights
    covariance = torch.from_numpy(ledoit_wolf(y.numpy(), assume_centered=True)[0])
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return None
    batch = data.transform.for_evaluation(*data.fetch("val", range(rows)), seed)
    y = batch.y.flatten(1).double() - F.pad(batch.c.double(), (1, 0), value=1.0) @ weights
    log_prob = MultivariateNormal(y.new_zeros(d), scale_tril=factor).log_prob(y)
    return float(bits_per_dim(log_prob, batch.log_det, d).mean())
