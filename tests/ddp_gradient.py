"""The gradient of a training step by Lightning, and the weights after it, of every process.

ddp_gradient.py FILE BATCH GRADIENT

In float64, with the same probe for every sample and data that need no noise: only the order of
sums can differ between one process and two.
"""

import sys

import torch
from pytorch_lightning import Callback, Trainer

from helpers import make_flow
from rnode import Probes
from rnode.app.processes import launched
from rnode.data.datamodule import DataModule
from rnode.data.splits import Splits
from rnode.training.module import RNODE
from rnode.transforms import Column, TableTransform


def source():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    columns = [Column(f"x{i}") for i in range(6)]
    return Splits(rows, rows, rows, transform=TableTransform(columns))


def sample(self, z, generators=None):
    """Replaces Probes.sample: one probe for all samples of all processes."""
    generator = torch.Generator().manual_seed(2)
    eps = torch.randn(1, 1, *z.shape[1:], generator=generator, dtype=z.dtype)
    return eps.expand(1, *z.shape)


class Keep(Callback):
    """Keeps the gradient that the optimizer gets."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradient = torch.cat([p.grad.flatten() for p in module.parameters()])


if __name__ == "__main__":
    path, batch, gradient = sys.argv[1:]
    Probes.sample = sample
    torch.manual_seed(0)
    flow = make_flow((6,), gradient=gradient, pieces=2)
    module = RNODE(flow, torch.optim.Adam, lambda_k=0.01, lambda_j=0.01)
    keep = Keep()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"max_steps": 1, "limit_val_batches": 0, **dict.fromkeys(off, False)}
    options |= {"accelerator": "cpu", "precision": "64-true", "callbacks": [keep]}
    trainer = Trainer(devices=2 if launched() else 1, **options)
    trainer.fit(module, DataModule(source, int(batch), 10))
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    content = {"gradient": keep.gradient, "weights": weights}
    torch.save(content, f"{path}.{trainer.global_rank}")
