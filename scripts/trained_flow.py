"""Copy what sampling and evaluation need of a checkpoint: no optimizer, and no path of a machine.

python scripts/trained_flow.py outputs/fashion_mnist/RUN/best.ckpt assets/fashion_mnist.ckpt
"""

import sys

import torch

from rnode.app.build import SECTIONS
from rnode.training.checkpoint import load_checkpoint

KEPT = ("format", "state_dict", "DataModule", "validation_bits", "global_step")
ROOT = "outputs/data"  # of data, by default


def main(source: str, target: str) -> None:
    checkpoint = load_checkpoint(source)
    config = {name: checkpoint["config"][name] for name in SECTIONS}
    config["dataset"]["root"] = ROOT
    torch.save({name: checkpoint[name] for name in KEPT} | {"config": config}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
