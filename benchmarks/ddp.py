"""A training step in two processes (DDP over gloo, on the CPU) beside the same step in one.

python benchmarks/ddp.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3]
                         [--quick]

The step is forward, gradient and Adam on the first grid of the default solver. Each process has the
whole batch, one thread and one core. A third contender takes the step in two processes that send
nothing: its cost above one process is that of the shared memory, and the cost of DDP above it is
that of the all-reduce. Repetitions are interleaved. The record is
benchmarks/results/ddp_DATASET.json.
"""

import argparse
import os
import tempfile

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import common
from common import COARSE, LAMBDA, make_flow
from rnode import Flow, objective
from rnode.app.processes import prepare_process
from step import adam_step


class Loss(nn.Module):
    """x (B, *shape) → equation (17). DDP needs the loss in `forward`."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return objective(self.flow(x), LAMBDA, LAMBDA)


def main() -> None:
    options = common.parse(common.arguments(__doc__))
    with tempfile.TemporaryDirectory() as folder:
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (options, f"file://{folder}/rendezvous", queue)
        torch.multiprocessing.spawn(process, arguments, nprocs=2)
        seconds, sent = queue.get()
    rows = []
    for name, median in seconds.items():
        ratio = f"{median / seconds['one process']:.3f}"
        row = {"contender": name, "seconds": f"{median:.3f}", "time": ratio}
        rows.append(row | {"MB all-reduced": f"{sent[name] / 1e6:.2f}"})
    size = f"batch {options.batch} a process, {options.channels} channels"
    title = f"training step, {options.dataset}, {size}, cpu"
    common.write_record(f"ddp_{options.dataset}", title, rows)


def process(rank: int, options: argparse.Namespace, rendezvous: str, queue) -> None:
    """Time the contenders in one of the two processes; the first one reports."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    prepare_process()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    x = common.images(options).cpu()
    one, apart, together = (Loss(make_flow(options, COARSE).cpu()) for _ in range(3))
    together = DistributedDataParallel(together)
    steps = {"one process": adam_step(one, lambda: one(x)) if rank == 0 else lambda: None}
    steps["two processes, nothing sent"] = adam_step(apart, lambda: apart(x))
    steps["two processes"] = adam_step(together, lambda: together(x))
    seconds = common.medians(steps, options.repetitions, before=distributed.barrier)
    tensors = [*together.module.parameters(), *together.module.buffers()]  # DDP sends both
    size = sum(t.numel() * t.element_size() for t in tensors)
    sent = dict.fromkeys(steps, 0) | {"two processes": size}
    if rank == 0:
        queue.put((seconds, sent))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
