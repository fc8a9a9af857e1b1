"""Two processes over gloo, as torchrun and Lightning start them: one run, one gradient."""

import sys
from pathlib import Path

import pytest
import torch

from helpers import TRAIN, column, succeed

TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]


@pytest.mark.slow(reason="starts three processes")
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(tmp_path, gradient):
    script = Path(__file__).with_name("ddp_gradient.py")
    succeed(*TWO, script, tmp_path / "two", 8, gradient)
    succeed(sys.executable, script, tmp_path / "one", 16, gradient)
    names = ("two.0", "two.1", "one.0")
    first, second, one = (torch.load(tmp_path / name, weights_only=True) for name in names)
    assert one["gradient"].norm() > 0.01
    assert (first["gradient"] - one["gradient"]).norm() < 1e-10 * one["gradient"].norm()
    for name in ("gradient", "weights"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow(reason="starts two processes")
def test_torchrun_starts_one_run(tmp_path):
    options = ["model.hidden=4", "model.pieces=1", "dataset.batch_size=64"]
    options += ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]
    options += ["trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    options += ["dataset.validation=31", "dataset.test=31", "dataset.eval_batch_size=10"]
    out = succeed(*TWO, TRAIN[1], *options)
    assert out.count("test/bits_per_dim ") == 1
    (folder,) = (tmp_path / "outputs" / "digits").iterdir()
    assert len(column(folder, "train/loss")) == 3
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert (folder / ".hydra" / "overrides.yaml").exists()
