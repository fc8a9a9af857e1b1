"""What several test files share. Tests do not import one another."""

import csv
import functools
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from rnode import Method, Probes, Solver, TimeConv2d, TimeLinear, mlp, multiscale
from rnode.app import cli

ROOT = Path(__file__).resolve().parent.parent
HANG = 1800  # seconds after which a test that waits has hung; no test depends on a shorter time
TRAIN = [sys.executable, ROOT / "src" / "train.py"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # sums then have one order on every machine

RK4 = Method("rk4")
DOPRI5 = Method("dopri5")
TIGHT = Method("dopri5", rtol=1e-9, atol=1e-9)

QUICK = ["model.hidden=4", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
QUICK += ["optimizer.lr=4e-3", "warmup_steps=0", "decay=false"]
TWO_STEPS = [
    *(*QUICK, "trainer.max_steps=2", "trainer.limit_val_batches=1"),
    *("trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"),
    *("dataset.batch_size=4", "dataset.eval_batch_size=4", "logger=csv"),
]
SHORT = ["trainer.max_epochs=1", "model.hidden=4", "logger=csv", "trainer.accelerator=cpu"]
SHORT += ["trainer.enable_progress_bar=false", "callbacks.figures.every_n_epochs=99"]  # a table
EPOCHS = [  # of two steps, each validated
    *(*TWO_STEPS, "trainer.max_steps=-1", "trainer.limit_train_batches=2"),
    "callbacks.interval=null",
]
SMALL = [  # 90 steps in three epochs
    *("model.hidden=4", "model.pieces=1", "optimizer.lr=4e-3", "warmup_steps=5"),
    *("dataset.batch_size=16", "dataset.eval_batch_size=20", "trainer.max_epochs=3"),
    *("trainer.limit_train_batches=30", "trainer.limit_val_batches=2"),
    *("trainer.limit_test_batches=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"),
    *("trainer.enable_progress_bar=false", "logger=csv"),
]


# Flows and tensors


class Linear(nn.Module):
    """f(t, z) = A z: everything about its flow is known in closed form."""

    def __init__(self, A):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t, z, c):
        return z @ self.A.T

    def vjp(self, t, z, eps, c):
        return self(t, z, c), eps @ self.A


def no_c(z):
    """c of a batch z without conditions, (B, 0)."""
    return z.new_empty(len(z), 0)


def randomize(module, scale=1.0):
    """Initialize every layer as PyTorch does, also the layers that start at zero."""
    for layer in module.modules():
        if isinstance(layer, TimeConv2d | TimeLinear):
            bound = scale * layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)
    return module


def make_flow(
    shape, *, train=RK4, test=DOPRI5, gradient="backprop", divergence="gaussian", probes=1, **sizes
):
    """A small flow of random weights, float64: multiscale for images, dense for vectors."""
    solver = Solver(train, test, gradient)
    model = multiscale if len(shape) == 3 else mlp
    flow = model(shape, solver, Probes(divergence, probes), **{"hidden": 8} | sizes)
    return randomize(flow.double())


def close(a, b, rtol):
    """Whether the relative error of two tensors, each as a whole, is at most `rtol`."""
    return bool((a - b).norm() <= rtol * torch.maximum(a.norm(), b.norm()))


# Commands


def call(command, *overrides):
    """Run a command in this process, exactly as the command line does."""
    freeze()
    before, sys.argv = sys.argv, [f"{command}.py", *overrides]
    try:
        cli.run(command)
    finally:
        sys.argv = before


@functools.cache
def freeze():
    """Import what runs need, and exempt it from garbage collection, which takes half a second."""
    import rnode.app.train  # noqa: F401

    gc.collect()
    gc.freeze()


def refused(capsys, command, *overrides, code=2):
    """Run a command that must end with an exit code; return the one line that it prints."""
    with pytest.raises(SystemExit) as stop:
        call(command, *overrides)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert stop.value.code == code
    return lines[0]


def process(*command, cwd=None, **variables):
    """Run a process to its end, with further environment variables."""
    options = {"capture_output": True, "text": True, "timeout": HANG, "check": False}
    return subprocess.run([*map(str, command)], cwd=cwd, env=ONE_THREAD | variables, **options)


def succeed(*command, **options):
    """Run a process that must succeed, and return what it prints to stdout."""
    done = process(*command, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


class Run:
    """A run of SMALL as a process, which prints to a file beside its folder."""

    def __init__(self, folder, *overrides):
        self.folder, self.err = folder, folder.with_name(f"{folder.name}.err")
        command = [*TRAIN, *SMALL, f"hydra.run.dir={folder}", *overrides]
        with open(self.err, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=ONE_THREAD)
        self.pid = self.process.pid

    def finish(self, code=0):
        """Wait for the end of the run, check its exit code and return what it printed."""
        ended = self.process.wait(HANG)
        assert ended == code, self.err.read_text()[-3000:]
        return self.err.read_text()

    def wait_until(self, condition):
        """Wait until `condition()` holds; fail if the run ends before."""
        read = self.err.read_text
        wait_until(condition, lambda: self.process.poll() is None, lambda: read()[-3000:])


def wait_until(condition, running=lambda: True, message=lambda: "nothing came of it"):
    """Poll until `condition()` holds; fail with `message()` when `running()` no longer does."""
    deadline = time.monotonic() + HANG
    while not condition():
        going = running() and time.monotonic() < deadline
        assert going or condition(), message()
        time.sleep(0.01)


def alive(pid):
    """Whether a process runs: neither ended nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# What a run has written


def metrics(folder):
    """The rows of metrics.csv without their empty columns."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: value for k, value in row.items() if value} for row in csv.DictReader(file)]


def column(folder, key):
    """The numbers of one column of metrics.csv."""
    return [float(row[key]) for row in metrics(folder) if key in row]


def curves(folder):
    """The rows of metrics.csv without the columns of time."""
    return [{k: value for k, value in row.items() if "seconds" not in k} for row in metrics(folder)]


def logged_step(folder):
    """The training step of the last row of metrics.csv; -1 before there is one."""
    return int(metrics(folder)[-1]["step"]) if (folder / "metrics.csv").exists() else -1


def last_step(folder):
    """The training step of last.ckpt."""
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def same(a, b, path=""):
    """Assert that values out of two checkpoints are equal to the bit, except times and paths."""
    if isinstance(a, dict):
        ignored = {"config", "dirpath", "best_model_path", "last_model_path", "best_k_models"}
        ignored |= {"kth_best_model_path", "current_score", "seconds", "seconds_total"}
        ignored |= {
            "validation",
            "epoch_loop.val_loop.batch_progress",
            "validate_loop",
        }  # nothing depends on it
        assert {str(key) for key in a} == {str(key) for key in b}, path
        for key in a.keys() - ignored:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(folder, whole):
    """Assert that two run folders hold the same checkpoints and curves."""
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (folder, whole)]
    same(*ends)
    same(*(torch.load(f / "best.ckpt", weights_only=True)["state_dict"] for f in (folder, whole)))
    assert curves(folder) == curves(whole)
