"""Two processes over gloo, as torchrun and Lightning start them: one run, one gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from helpers import HANG, ROOT, column
from rnode.app.processes import launched, match_processes, run_name
from rnode.data.datamodule import DataModule
from rnode.data.splits import Splits
from rnode.transforms import Column, TableTransform

ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*command, cwd):
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def succeed(*command, cwd):
    """What a command prints to stdout."""
    done = start(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow(reason="starts three processes")
@pytest.mark.parametrize("gradient", ["backprop", "adjoint"])
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(tmp_path, gradient):
    script = TESTS / "ddp_gradient.py"
    succeed(*TWO, script, tmp_path / "two", 8, gradient, cwd=tmp_path)
    succeed(*ONE, script, tmp_path / "one", 16, gradient, cwd=tmp_path)
    names = ("two.0", "two.1", "one.0")
    first, second, one = (torch.load(tmp_path / name, weights_only=True) for name in names)
    assert one["gradient"].norm() > 0.01
    assert (first["gradient"] - one["gradient"]).norm() < 1e-10 * one["gradient"].norm()
    for name in ("gradient", "weights"):
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run by torchrun, in its default folder."""
    cwd = tmp_path_factory.mktemp("torchrun")
    options = ["model.hidden=4", "model.pieces=1", "dataset.batch_size=64"]
    options += ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]
    options += ["trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    options += ["dataset.validation=31", "dataset.test=31", "dataset.eval_batch_size=10"]
    out = succeed(*TWO, ROOT / "src" / "train.py", *options, cwd=cwd)
    assert out.count("bits/dim (± standard error)") == 1
    (run_folder,) = (cwd / "outputs" / "digits").iterdir()
    return run_folder


@pytest.mark.slow(reason="starts three processes")
def test_torchrun_starts_one_run(folder):
    assert len(column(folder, "train/loss")) == 3
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert (folder / ".hydra" / "overrides.yaml").exists()


def test_each_process_gets_its_share_of_a_split():
    rows = torch.arange(11, dtype=torch.float32)[:, None]
    splits = Splits(rows, rows, rows, TableTransform([Column("x")]))
    data = DataModule(lambda: splits, 4, 3)
    data.setup()
    batches = [batch for rank in range(3) for batch in data.eval_dataloader("test", rank, 3)]
    for x, index, _ in batches:
        assert torch.equal(x[:, 0].long(), index)
    assert sorted(torch.cat([index for _, index, _ in batches]).tolist()) == list(range(11))


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"SLURM_PROCID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}, "slurm-77"),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2"}, "slurm-77.2"),
    ],
)
def test_a_slurm_job_is_named_by_its_number(monkeypatch, variables, name):
    size = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    for key, value in (variables | size | {"SLURM_JOB_NAME": "train"}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run_name() == name
    trainer = OmegaConf.create({"devices": 1, "num_nodes": 1})
    match_processes(trainer)
    assert trainer == {"devices": 2, "num_nodes": 2}
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert launched() is None
