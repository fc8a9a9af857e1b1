"""The number of threads that a run chooses, beside fixed ones, on idle and on busy cores.

python benchmarks/threads.py [--repetitions 5] [--epochs 3] [--quick]

Needs a machine on which nothing else runs, and at least two cores. A busy core is one to which a
process that never waits is bound. A step is the gradient of a batch of noise by the first grid of
the default: 32 images with the flows of FLOWS, or 512 rows of a table with seven columns. Fixed
numbers take turns; figures are medians. `chosen` is what the callback of a run takes for the same
flow. The last rows are the training seconds of `rnode train` on digits. The record is
benchmarks/results/threads.json.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from common import COARSE, DOPRI5, FINE, LAMBDA, as_if_trained, medians, write_record
from rnode import Flow, Probes, Solver, mlp, multiscale, objective
from rnode.app.processes import prepare_process
from rnode.training.module import RNODE
from rnode.training.threads import Threads
from rnode.transforms import Batch

ROOT = Path(__file__).resolve().parent.parent
CORES = sorted(os.sched_getaffinity(0))
SITUATIONS = {"idle": [], "one core busy": CORES[:1], "all cores busy": CORES}
IMAGES, ROWS = Solver(COARSE, DOPRI5), Solver(FINE, DOPRI5)
FLOWS: dict[str, Callable[[], Flow]] = {
    "digits": lambda: multiscale((1, 8, 8), IMAGES, Probes(), hidden=32, pieces=1),
    "FashionMNIST 14×14": lambda: multiscale((1, 14, 14), IMAGES, Probes(), hidden=16, pieces=1),
    "FashionMNIST 28×28": lambda: multiscale((1, 28, 28), IMAGES, Probes()),
    "table": lambda: mlp((7,), ROWS, Probes(), hidden=96, layers=3),
}
COUNTS = [2**k for k in range(len(CORES).bit_length())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of the runs of digits")
    parser.add_argument("--quick", action="store_true", help="one repetition, and no runs")
    options = parser.parse_args()
    prepare_process()
    os.environ.pop("OMP_NUM_THREADS", None)
    flows = dict(list(FLOWS.items())[: 1 if options.quick else None])
    repetitions = 1 if options.quick else options.repetitions
    rows = []
    for situation, cores in SITUATIONS.items():
        with busy(cores):
            for name, make in flows.items():
                rows.append(steps(situation, name, make, repetitions))
                print(rows[-1], flush=True)
            if not options.quick:
                rows.append(runs(situation, options.epochs))
                print(rows[-1], flush=True)
    write_record("threads", f"threads, {len(CORES)} cores", rows)


@contextlib.contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """Keep these cores busy."""
    with contextlib.ExitStack() as stack:
        for core in cores:
            code = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
            process = subprocess.Popen([sys.executable, "-c", code])
            stack.callback(process.kill)
        yield


def row(situation: str, name: str, fixed: dict[int, float], chosen: str, seconds: float) -> dict:
    columns = {f"{count} threads": f"{fixed[count]:.3f} s" for count in fixed}
    ratio = seconds / min(fixed.values())
    return {
        "cores": situation,
        "run": name,
        **columns,
        "chosen": chosen,
        "chosen / best": f"{ratio:.2f}",
    }


def steps(situation: str, name: str, make: Callable[[], Flow], repetitions: int) -> dict:
    """Time a step by each number of threads, and let the callback choose one."""
    torch.manual_seed(0)
    flow = as_if_trained(make())
    module = RNODE(flow, torch.optim.Adam, LAMBDA, LAMBDA)
    x = torch.randn(512 if name == "table" else 32, *flow.shape)

    def step(count: int) -> None:
        torch.set_num_threads(count)
        objective(flow(x), LAMBDA, LAMBDA).backward()

    contenders: dict[int, Callable] = {count: partial(step, count) for count in COUNTS}
    seconds = medians(contenders, repetitions)
    threads = Threads(None)
    threads.choose(trainer_of(x), module)
    return row(situation, name, seconds, str(threads.count), seconds[threads.count])


def trainer_of(x: torch.Tensor) -> SimpleNamespace:
    """What the callback asks of a trainer whose data are x."""
    batch = Batch(x, torch.zeros(len(x)), torch.arange(len(x)), torch.empty(len(x), 0))
    transform = SimpleNamespace(for_evaluation=lambda *_: batch)
    splits = SimpleNamespace(train=x)
    fetch = lambda *_: ()  # noqa: E731
    data = SimpleNamespace(batch_size=len(x), splits=splits, transform=transform, fetch=fetch)
    precision = SimpleNamespace(train_step_context=contextlib.nullcontext)
    return SimpleNamespace(datamodule=data, precision_plugin=precision, print=print)


def runs(situation: str, epochs: int) -> dict:
    """Train on digits by each number of threads, and by the number that the run chooses."""
    quiet = ["logger=csv", "callbacks.figures=null", f"trainer.max_epochs={epochs}"]
    found = {}
    for count in (*COUNTS, None):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "src/train.py", *quiet, f"hydra.run.dir={folder}"]
            command += [f"threads={count}"] if count else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
            found[count] = result["train/seconds"]
    line = next(line for line in done.stdout.splitlines() if " threads: " in line)
    chosen = found.pop(None)
    return row(situation, "digits, a run", found, f"{line.split()[0]}: {chosen:.1f} s", chosen)


if __name__ == "__main__":
    main()
