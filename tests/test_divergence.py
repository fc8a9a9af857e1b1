"""A solve that diverges, and a run that does."""

import math
import re

import pytest
import torch

from helpers import DOPRI5, EPOCHS, TWO_STEPS, Linear, call, refused
from rnode import Diverged, Method, Piece, Probes
from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE

pytestmark = pytest.mark.usefixtures("blank_figures")


class Explodes(Linear):
    def vjp(self, t, z, eps):
        return z**3, eps


class Broken(Linear):
    def vjp(self, t, z, eps):
        raise AssertionError("a bug")


@pytest.mark.parametrize(
    ("field", "method", "error", "message"),
    [
        (Explodes, DOPRI5, Diverged, "the step size of the adaptive solver underflowed"),
        (Linear, Method("dopri5", max_steps=1), Diverged, "took more than max_steps"),
        (Broken, DOPRI5, AssertionError, "^a bug$"),
    ],
)
def test_only_the_assertions_of_a_diverging_solver_are_divergence_errors(
    field, method, error, message
):
    z = 10 * torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(error, match=message):
        Piece(field(torch.eye(3).double()))(z, Probes().sample(z), method, "backprop")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("optimizer.lr=1e15", "piece 1 became NaN or infinite at training step 1"),
        ("optimizer.lr=1e15 solver=dopri5 solver.gradient=adjoint", "underflow"),
        ("solver=dopri5 solver.train.max_steps=1", "max_num_steps exceeded"),
    ],
)
def test_a_run_that_diverges_says_when_and_what_to_try(capsys, tmp_path, overrides, words):
    options = [*TWO_STEPS, "trainer.max_steps=20", *overrides.split()]
    line, code = refused(capsys, "train", f"hydra.run.dir={tmp_path}", *options)
    assert words in line
    assert re.search(r"piece \d+ .*at training step \d+; try a smaller optimizer.lr", line)
    assert line.endswith("last good checkpoint: none yet")
    assert code == 1


def test_a_validation_that_diverges_says_so(capsys, tmp_path):
    options = [f"hydra.run.dir={tmp_path}", *TWO_STEPS, "solver.test.max_steps=1"]
    line, code = refused(capsys, "train", *options)
    assert "took more than max_steps" in line
    assert "try a smaller optimizer.lr" in line
    assert code == 1


@pytest.mark.parametrize(
    ("times", "rewind"),
    [(1, False), (2, True), pytest.param(4, True, marks=pytest.mark.slow(reason="four runs"))],
)
def test_a_divergence_stops_the_run_or_rewinds_it(tmp_path, capsys, monkeypatch, times, rewind):
    """The batch of step 3, in the second epoch, is NaN the first `times` that it comes."""
    healthy, left = RNODE.training_step, iter(range(times))

    def sick(self, batch, batch_idx):
        if self.global_step == 3 and next(left, None) is not None:
            batch = batch._replace(y=batch.y * math.nan)
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", sick)
    options = ["trainer.max_epochs=3", "trainer.log_every_n_steps=50", "optimizer.lr=0.01"]
    options += ["trainer.on_divergence=rewind"] if rewind else []
    train = ["train", *EPOCHS, *options, f"hydra.run.dir={tmp_path}"]
    if times == 2:
        call(*train)
    else:
        with pytest.raises(SystemExit, match="1"):
            call(*train)
    lines = capsys.readouterr().err.strip().splitlines()
    diverged = "z of piece 1 became NaN or infinite at training step 3; "
    if times != 2:
        advice = lines.pop()
        assert advice.startswith(f"error: {diverged}try a smaller optimizer.lr")
        assert advice.endswith(f"last good checkpoint: {tmp_path / 'last.ckpt'}")
    back = f"{diverged}going back to step 2 with half the learning rate"
    assert lines == [back] * {1: 0, 2: 2, 4: 3}[times]  # a run goes back three times at most
    last, best = (load_checkpoint(tmp_path / name) for name in ("last.ckpt", "best.ckpt"))
    assert last["global_step"] == (6 if times == 2 else 2)
    for checkpoint in (last, best):
        assert all(weight.isfinite().all() for weight in checkpoint["state_dict"].values())
    lr = last["optimizer_states"][0]["param_groups"][0]["lr"]
    assert lr == pytest.approx(0.01 / 4 if times == 2 else 0.01)
