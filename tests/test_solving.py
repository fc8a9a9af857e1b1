"""How a flow is solved while it trains: no waits for the device, TF32 on a fixed grid alone."""

import contextlib
import gc
import weakref
from collections import Counter
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers import DOPRI5, RK4
from rnode import Method, Probes, Solver, multiscale
from rnode.data import datamodule
from rnode.data.images import digits
from rnode.training.divergence import DivergenceWatch
from rnode.training.graphs import record_solves
from rnode.training.module import RNODE
from rnode.training.progress import Report
from rnode.training.solving import TF32, with_steps

SLOW = pytest.mark.slow(reason="a run; another one is among the quick tests")
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class Waits(TorchDispatchMode):
    """Counts the operators that read the device or copy from the host to it."""

    def __init__(self):
        super().__init__()
        self.found, self.operators = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, self.operators = func.__name__.split(".")[0], self.operators + 1
        moves = name == "_to_copy" and (kwargs or {}).get("device") is not None
        if name in READS or name == "lift_fresh" or moves:  # lift_fresh: of torch.tensor(…)
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Counts from the third step to the seventh, between two log steps."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            self.stack = contextlib.ExitStack()
            self.waits = self.stack.enter_context(Waits())
        if batch_idx == 6:
            self.stack.close()


@pytest.mark.parametrize(
    ("train", "gradient"),
    [
        (Method("rk4", "radau", steps=2), "backprop"),
        pytest.param(Method("rk4", "radau", steps=2), "checkpoint", marks=SLOW),
        pytest.param(Method("rk4", "simpson", steps=2), "adjoint", marks=SLOW),
        (RK4, "adjoint"),
    ],
)
def test_a_training_step_on_a_fixed_grid_never_waits(train, gradient, monkeypatch):
    """Forward, backward, optimizer, logs, progress bar and the watch for NaN of a whole run."""
    fetch = datamodule.fetch

    def fetch_uncounted(*arguments):  # a batch has to be copied
        with _disable_current_modes():
            return fetch(*arguments)

    monkeypatch.setattr(datamodule, "fetch", fetch_uncounted)
    # An accelerator is asked at log steps alone, a processor always.
    monkeypatch.setattr(DivergenceWatch, "raise_if_diverged", lambda self: None)
    watch = Watch()
    fit(Solver(train, RK4, gradient), [watch, Report(bar=False)], max_steps=8, limit_val_batches=0)
    assert watch.waits.operators > 4000
    assert watch.waits.found == Counter()


def fit(solver, callbacks, **options):
    """Train a small flow on digits."""
    flow = multiscale((1, 8, 8), solver, Probes(), hidden=4, pieces=1)
    data = datamodule.DataModule(digits, batch_size=8, eval_batch_size=8, alpha=1e-5)
    # Adam keeps its count of steps on the host unless it is fused.
    adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=callbacks, log_every_n_steps=20, **quiet, **options
    )
    trainer.fit(RNODE(flow, adam, 0.01, 0.01, warmup_steps=20), data)


class NewGrids(pl.Callback):
    """Records solves, on a finer grid in each step."""

    def on_fit_start(self, trainer, module):
        record_solves(module.flow, 8)

    def on_train_batch_start(self, trainer, module, *_):
        module.flow.solver = with_steps(module.flow.solver, 1 + trainer.global_step)


def test_the_record_of_an_earlier_grid_is_freed_before_the_next(monkeypatch):
    """A CUDA graph holds the memory of its solve. A run on a finer grid may need all there is."""
    records = []

    def record(function, samples, allow_unused_input):
        assert sum(graphed() is not None for graphed in records) < 3  # of the other pieces
        function(*samples)

        class Graphed:  # refers to itself, as the class that torch makes of a graph does
            @staticmethod
            def replay(*inputs):
                outputs = function(*inputs)
                outputs[0].register_hook(lambda gradient: Graphed and None)
                return outputs

        records.append(weakref.ref(Graphed))
        return Graphed.replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    gc.disable()  # it might free them by chance
    try:
        solver = Solver(Method("rk4", "radau", steps=1), RK4, "backprop")
        fit(solver, [NewGrids()], max_steps=3, limit_val_batches=0)
    finally:
        gc.enable()
    assert len(records) == 3 * 3  # steps, pieces


class Flags(pl.Callback):
    """Records whether convolutions may use TF32 in training steps and in validation."""

    def on_before_backward(self, trainer, module, loss):
        self.train = torch.backends.cudnn.allow_tf32

    def on_validation_batch_end(self, *_):
        self.val = torch.backends.cudnn.allow_tf32


@pytest.fixture
def restored():
    """Sets the flags of TF32 back afterwards."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, flag in zip(backends, before, strict=True):
        backend.allow_tf32 = flag


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("train", "everywhere", "expected"),
    [
        (RK4, False, (True, False)),
        pytest.param(DOPRI5, False, (False, False), marks=SLOW),
        pytest.param(DOPRI5, True, (True, True), marks=SLOW),
    ],
)
def test_tf32_is_for_fixed_grids_unless_it_is_for_everything(train, everywhere, expected):
    flags = Flags()
    fit(
        Solver(train, RK4),
        [TF32(everywhere), flags],
        max_steps=1,
        limit_val_batches=1,
        val_check_interval=1,
    )
    assert (flags.train, flags.val) == expected
    assert torch.backends.cuda.matmul.allow_tf32 == everywhere
