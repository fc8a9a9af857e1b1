"""The number of threads by which the CPU computes a training step."""

import os
import statistics
import time

import torch
from joblib import cpu_count
from pytorch_lightning import Callback, Trainer

from rnode.loss import objective
from rnode.training.module import RNODE

REPETITIONS = 3  # timed steps of each number of threads
WINDOW = 9  # steps whose median is compared
SLOWDOWN = 2.0  # ratio from which threads are chosen again


class Threads(Callback):
    """Takes the number of threads, a power of two, by which a training step is fastest.

    Threads wait for one another thousands of times in a step, for long if another program uses a
    core. They are chosen again when steps have become SLOWDOWN times as slow. `count`, or else
    OMP_NUM_THREADS, fixes their number, and a run that resumes goes on with those that it had.
    """

    def __init__(self, count: int | None):
        self.fixed = count or int((os.environ.get("OMP_NUM_THREADS") or "0").split(",")[0])
        self.count = 0
        self.usual = 0.0  # seconds of each evaluation of f with so many threads
        self.recent = []

    def on_train_start(self, trainer: Trainer, module: RNODE) -> None:
        if self.fixed or self.count:
            torch.set_num_threads(self.fixed or self.count)
        elif module.device.type == "cpu" and usable_cores() > 1:
            self.choose(trainer, module)

    def choose(self, trainer: Trainer, module: RNODE) -> None:
        """Time the gradient of a batch, which changes nothing else, by more and more threads."""
        data = trainer.datamodule
        index = torch.arange(min(data.batch_size, len(data.splits.train)))
        batch = data.transform.for_evaluation(*data.fetch("train", index), module.seed)

        def seconds() -> float:
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(module.seed)
            with trainer.precision_plugin.train_step_context():
                solution = module.flow.solve(batch.y, batch.c, generator)
                loss = objective(solution.state, module.lambda_k, module.lambda_j, solution.log_q)
            torch.autograd.grad(loss, [*module.flow.parameters()], allow_unused=True)
            return time.perf_counter() - start

        cores = usable_cores()
        timings: dict[int, float] = {}
        for count in (2**k for k in range(cores.bit_length())):
            torch.set_num_threads(count)
            timings[count] = seconds()  # starts the threads, or takes minutes on a busy machine
            if timings[count] < SLOWDOWN * min(timings.values()):
                timings[count] = statistics.median(seconds() for _ in range(REPETITIONS))
            if timings[count] > min(timings.values()):
                break
        self.count = min(timings, key=timings.__getitem__)
        self.usual = 0.0
        torch.set_num_threads(self.count)
        timed = ", ".join(f"{timings[count]:.2g} s with {count}" for count in timings)
        trainer.print(f"{self.count} of {cores} threads: a gradient takes {timed}")

    def on_train_batch_start(self, *_) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: RNODE, *_) -> None:
        self.recent.append((time.perf_counter() - self.began) / max(1, module.nfe))
        if self.count and len(self.recent) >= WINDOW:
            now = statistics.median(self.recent)
            self.recent = []
            self.usual = self.usual or now
            if now > SLOWDOWN * self.usual:
                self.choose(trainer, module)

    def state_dict(self) -> dict:
        return {"count": self.count, "usual": self.usual}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def usable_cores() -> int:
    """Return the cores that this process may use, by its affinity, cgroup and SLURM."""
    cores = cpu_count()
    return min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
