"""How a flow is solved while it trains: no waits for the device, finer grids, TF32."""

import itertools
from collections import Counter
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers import DOPRI5, RK4, TWO_STEPS, column
from rnode import Method, Probes, Solver, multiscale
from rnode.data.datamodule import DataModule
from rnode.data.images import digits
from rnode.training import refine
from rnode.training.module import RNODE
from rnode.training.progress import Progress
from rnode.training.refine import TF32

SLOW = pytest.mark.slow(reason="a run; another one is among the quick tests")
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


def fit(solver, callbacks, **options):
    """Train a small flow on digits."""
    flow = multiscale((1, 8, 8), solver, Probes(), hidden=4, pieces=1)
    # Adam keeps its count of steps on the host unless it is fused.
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    options |= {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(callbacks=callbacks, log_every_n_steps=20, **options)
    trainer.fit(RNODE(flow, adam, 0.01, 0.01, warmup_steps=20), DataModule(digits, 8, 8))


class Waits(TorchDispatchMode):
    """Counts the operators that read the device or copy from the host to it."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, self.operators = func.__name__.split(".")[0], self.operators + 1
        copies = name == "_to_copy" and (kwargs or {}).get("device") is not None
        if name in READS or name == "lift_fresh" or copies:  # lift_fresh: of torch.tensor(…)
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class CountWaits(pl.Callback):
    """Counts from the third step to the seventh, between two log steps."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            self.waits = Waits().__enter__()
        if batch_idx == 6:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("gradient", ["backprop", pytest.param("checkpoint", marks=SLOW)])
def test_a_training_step_on_a_fixed_grid_never_waits(gradient, monkeypatch):
    """Forward, backward, optimizer, logs, progress and the check for NaN of a whole run."""
    fetch = DataModule.fetch

    def fetch_uncounted(self, split, index):  # a batch has to be copied
        with _disable_current_modes():
            return fetch(self, split, index)

    monkeypatch.setattr(DataModule, "fetch", fetch_uncounted)
    # An accelerator is asked at log steps alone, a processor always.
    monkeypatch.setattr(RNODE, "raise_if_diverged", lambda self: None)
    counter = CountWaits()
    solver = Solver(Method("rk4", "radau", steps=2), RK4, gradient)
    fit(solver, [counter, TF32(), Progress()], max_steps=8, limit_val_batches=0)
    assert counter.waits.operators > 4000
    assert counter.waits.found == Counter()


class Flags(pl.Callback):
    """Records whether convolutions may use TF32 in training steps and in validation."""

    def on_before_backward(self, trainer, module, loss):
        self.train = torch.backends.cudnn.allow_tf32

    def on_validation_batch_end(self, *_):
        self.val = torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("train", "uses"), [(RK4, True), pytest.param(DOPRI5, False, marks=SLOW)])
def test_tf32_is_for_convolutions_of_training_steps_on_a_fixed_grid(train, uses, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    flags = Flags()
    once = {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 1}
    fit(Solver(train, RK4), [TF32(), flags], **once)
    assert (flags.train, flags.val) == (uses, False)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_grid_may_be_doubled_often_at_first_and_at_times_later():
    allowed = [refine.doublings(step) for step in range(400)]
    later = {*range(30, 100, 10), *range(100, 400, 25)}
    assert allowed == [4, *(int(step in later) for step in range(1, 400))]


@pytest.mark.parametrize(("change", "steps"), [(0.5, 2), (-0.5, 2), (0.51, 4), (-0.51, 4)])
def test_a_grid_is_refined_when_a_finer_one_changes_the_likelihood_by_more(change, steps):
    flow = multiscale((1, 4, 4), Solver(Method("rk4", steps=2), DOPRI5), Probes(), hidden=2)
    found = refine.refine(flow, lambda: flow.solver.train.steps / 2 * change, tolerance=0.5)
    assert found == (None if steps == 2 else pytest.approx(change))
    assert flow.solver.train.steps == steps


FEW = [*TWO_STEPS, "model.pieces=1", "dataset.batch_size=32", "optimizer.lr=0.05"]
FEW += ["callbacks.figures=null", "trainer.max_epochs=2"]


def test_the_training_grid_is_refined_where_a_finer_one_gives_another_likelihood(run, monkeypatch):
    """solver=auto starts with two steps a piece, 8 evaluations, in 3 pieces."""
    monkeypatch.setattr(refine, "doublings", lambda step: 1)
    tolerance = "callbacks.refine_grid.tolerance={}"
    never = run(*FEW, "trainer.max_steps=4", tolerance.format(100), folder="never")
    assert column(never, "train/nfe_forward") == [24, 24, 24, 24]
    # At the first step f = 0, the same on every grid.
    always = column(run(*FEW, "trainer.max_steps=4", tolerance.format(0)), "train/nfe_forward")
    assert always[:2] == [24, 48]
    assert all(b in (a, 2 * a) for a, b in itertools.pairwise(always))
    again = run(*FEW, "trainer.max_steps=5", "ckpt_path=auto", tolerance.format(100))
    assert column(again, "train/nfe_forward")[-1] == always[-1]  # the checkpoint has the grid


def test_a_run_whose_grid_would_be_refined_for_ever_has_diverged(run, monkeypatch, capsys):
    monkeypatch.setattr(refine, "doublings", lambda step: 4)
    monkeypatch.setattr(refine, "LARGEST_GRID", 4)
    with pytest.raises(SystemExit, match="1"):
        run(*FEW, "callbacks.refine_grid.tolerance=0", "trainer.max_steps=5")
    assert "and the grid has 8 steps already; try a smaller optimizer.lr" in capsys.readouterr().err
