"""A solve that diverges, and a run that does."""

import math
import re

import pytest
import torch

from helpers import DOPRI5, EPOCHS, TWO_STEPS, Linear, no_c, refused
from rnode import Diverged, Piece, Probes, solver
from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE

pytestmark = pytest.mark.usefixtures("blank_figures")
ADVICE = "; try a smaller optimizer.lr"


def break_down(field, t, z, eps, c):
    raise AssertionError("a bug")


@pytest.mark.parametrize(
    ("vjp", "most", "error", "message"),
    [
        (lambda field, t, z, eps, c: (z**3, eps), 10_000, Diverged, "gave up: underflow in dt"),
        (Linear.vjp, 1, Diverged, "gave up: max_num_steps exceeded"),
        (break_down, 10_000, AssertionError, "^a bug$"),
    ],
)
def test_only_assertions_of_a_solver_become_diverged(vjp, most, error, message, monkeypatch):
    monkeypatch.setattr(solver, "MAX_STEPS", most)
    monkeypatch.setattr(Linear, "vjp", vjp)
    z = 10 * torch.ones(2, 3, dtype=torch.float64)
    piece = Piece(Linear(torch.eye(3).double()))
    with pytest.raises(error, match=message):
        piece(z, no_c(z), Probes().sample(z), DOPRI5, "backprop")


@pytest.mark.parametrize(
    ("overrides", "most", "words"),
    [
        ("optimizer.lr=1e15", 10_000, "error: the gradient became NaN or infinite at training"),
        ("optimizer.lr=1e15 solver=dopri5 solver.gradient=adjoint", 10_000, "underflow"),
        ("solver=dopri5", 1, "gave up: max_num_steps exceeded"),
        ("", 1, "gave up: max_num_steps exceeded (1>=1) in piece 1; val bits/dim is nan after"),
    ],
)
def test_a_run_says_why_it_diverged(capsys, tmp_path, overrides, most, words, monkeypatch):
    monkeypatch.setattr(solver, "MAX_STEPS", most)  # adaptive methods test, and may train
    options = [*TWO_STEPS, "trainer.max_steps=20", *overrides.split()]
    line = refused(capsys, "train", f"hydra.run.dir={tmp_path}", *options, code=1)
    assert words in line
    assert re.search(rf" training step \d+{ADVICE}", line)
    last = tmp_path / "last.ckpt"
    assert line.endswith(f"last good checkpoint: {last if last.exists() else 'none yet'}")
    assert (tmp_path / "diverged.txt").read_text().strip() in line


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    """The batch of step 3, in the second epoch, is NaN."""
    healthy = RNODE.training_step

    def sick(self, batch, batch_idx):
        if self.global_step == 3:
            batch = batch._replace(y=batch.y * math.nan)
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", sick)
    options = ["trainer.max_epochs=3", "trainer.log_every_n_steps=50", f"hydra.run.dir={tmp_path}"]
    line = refused(capsys, "train", *EPOCHS, *options, code=1)
    assert "the gradient became NaN or infinite at training step 3;" in line
    assert line.endswith(f"last good checkpoint: {tmp_path / 'last.ckpt'}")
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint["global_step"] == 2
        assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())
