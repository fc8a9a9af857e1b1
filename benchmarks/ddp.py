"""What a training step costs in two processes (DDP over gloo, on the CPU) beside the same step in one.

python benchmarks/ddp.py [--dataset fashion_mnist] [--batch 32] [--channels 64] [--repetitions 3] [--quick]

The step is that of the default's first grid: forward, gradient, Adam, with the whole batch in each process, one thread each
and each held to a core of its own. In between both take the step without sending anything: what is more than in one process
is then the memory they share, and what comes on top is the gradient's way. Repetitions are interleaved. Written to
outputs/benchmarks/ddp_DATASET.csv and .png as well.
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
from rnode.allocator import keep_freed_memory
from step import adam_step


class Loss(nn.Module):
    """x (B, *shape) → equation (17): DDP follows what goes through `forward`."""

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return objective(self.flow(x), LAMBDA, LAMBDA)


def main() -> None:
    options = common.parse(common.arguments(__doc__))
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        torch.multiprocessing.spawn(process, (options, f"file://{folder}/rendezvous", queue), nprocs=2)
        seconds, sent = queue.get()
    rows = []
    for name, median in seconds.items():
        row = {"contender": name, "seconds": f"{median:.3f}", "time": f"{median / seconds['one process']:.3f}"}
        rows.append(row | {"MB all-reduced": f"{sent[name] / 1e6:.2f}"})
    title = f"training step, {options.dataset}, batch {options.batch} a process, {options.channels} channels, cpu"
    common.report(f"ddp_{options.dataset}", title, rows, bars="time", label="time against one process")


def process(rank: int, options: argparse.Namespace, rendezvous: str, queue) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    keep_freed_memory()
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    x, flows = common.images(options).cpu(), [make_flow(options, COARSE).cpu() for _ in range(3)]
    one, apart, together = (Loss(flow) for flow in flows)
    together = DistributedDataParallel(together)
    steps = {"one process": adam_step(one, lambda: one(x)) if rank == 0 else lambda: None}
    steps["two processes, nothing sent"] = adam_step(apart, lambda: apart(x))
    steps["two processes"] = adam_step(together, lambda: together(x))
    seconds = common.medians(steps, options.repetitions, before=distributed.barrier)
    tensors = [*together.module.parameters(), *together.module.buffers()]  # DDP sends the second too
    sent = dict.fromkeys(steps, 0) | {"two processes": sum(t.numel() * t.element_size() for t in tensors)}
    if rank == 0:
        queue.put((seconds, sent))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
