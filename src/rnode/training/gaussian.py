"""The baseline of a run: the likelihood of one Gaussian."""

import math

from pytorch_lightning import Callback, Trainer

from rnode.bases import Normal
from rnode.data.closed_forms import gaussian_bits
from rnode.data.datamodule import DataModule
from rnode.training.module import RNODE
from rnode.training.results import GAUSSIAN


class GaussianBaseline(Callback):
    """Logs val/bits_per_dim_gaussian, of the samples on which the flow is validated.

    A flow that starts at a closed form has that as its baseline.
    """

    bits: float | None = None

    def on_fit_start(self, trainer: Trainer, module: RNODE) -> None:
        data = trainer.datamodule
        bits = None
        if isinstance(module.flow.base, Normal) and trainer.is_global_zero:
            bits = gaussian_bits(data, validation_rows(trainer, data), data.seed)
        self.bits = trainer.strategy.broadcast(bits)
        if bits is not None:
            print(f"a Gaussian with full covariance has {bits:.4f} validation bits/dim")

    def on_validation_epoch_end(self, *_) -> None:
        if self.bits is not None:
            self.log(GAUSSIAN, self.bits, sync_dist=True)


def validation_rows(trainer: Trainer, data: DataModule) -> int:
    """Return how many rows a validation measures."""
    limit = trainer.limit_val_batches
    size = data.eval_batch_size * trainer.world_size
    batches = math.ceil(len(data.splits.val) / size)  # which Lightning counts, not rows
    batches = int(limit * batches) if isinstance(limit, float) else min(limit, batches)
    return min(size * batches, len(data.splits.val))
