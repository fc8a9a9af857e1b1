"""The gradient of one training step, by Lightning: `ddp_gradient.py FILE BATCH GRADIENT`, in one process or under torchrun.

float64, the same probe for every sample, images without noise: what is left to differ is the order of the sums.
"""

import sys

import torch
from pytorch_lightning import Callback, Trainer

from conftest import make_flow
from launch import launched
from rnode import Probes
from rnode.data import DataModule, Splits
from rnode.module import RNODE


def source():
    rows = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Splits(rows, rows, rows)


def draw(self, z, generators=None):
    eps = torch.randn(1, 1, *z.shape[1:], generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    return eps.expand(1, *z.shape)


class Keep(Callback):
    """The gradient as the optimizer sees it, and the weights after its step, of every process."""

    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradient = torch.cat([p.grad.flatten() for p in module.parameters()])

    def on_train_end(self, trainer, module):
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        torch.save({"gradient": self.gradient, "weights": weights}, f"{self.path}.{trainer.global_rank}")


def main() -> None:
    path, batch, gradient = sys.argv[1:]
    started = launched()
    Probes.draw = draw
    torch.manual_seed(0)
    flow = make_flow((1, 8, 8), gradient=gradient, pieces=1)
    module = RNODE(flow, torch.optim.Adam, 0.01, 0.01)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if started is None else started.per_node,
        precision="64-true",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep(path)],
    )
    trainer.fit(module, DataModule(source, [1, 8, 8], int(batch), 10))


if __name__ == "__main__":
    main()
