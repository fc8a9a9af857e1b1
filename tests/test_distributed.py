"""Several processes over gloo, as torchrun starts them: one run, the gradient of one process, every image once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rnode.data import DataModule, Splits
from test_train import ROOT, column

TESTS = Path(__file__).parent
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{TESTS}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}


def run(*command, cwd):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("gradient", ["backprop", pytest.param("adjoint", marks=pytest.mark.slow)])  # three more starts
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(tmp_path, gradient):
    script = TESTS / "ddp_gradient.py"
    run(*TWO, script, tmp_path / "two", 8, gradient, cwd=tmp_path)
    run(sys.executable, script, tmp_path / "one", 16, gradient, cwd=tmp_path)
    first, second, one = (torch.load(tmp_path / name, weights_only=True) for name in ("two.0", "two.1", "one.0"))
    assert one["gradient"].norm() > 0.01
    assert (first["gradient"] - one["gradient"]).norm() < 1e-10 * one["gradient"].norm()
    for name in ("gradient", "weights"):
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run by torchrun, in the folder that it gets by itself."""
    cwd = tmp_path_factory.mktemp("torchrun")
    options = ["model.hidden=4", "model.pieces=1", "dataset.batch_size=64", "trainer.max_epochs=1"]
    options += [
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1",
        "pictures.samples=4",
        "trainer.limit_train_batches=3",
    ]
    options += ["dataset.validation=31", "dataset.test=31", "dataset.eval_batch_size=10"]
    out = run(*TWO, ROOT / "src" / "train.py", *options, cwd=cwd)
    assert out.count("bits/dim (± standard error)") == 1
    (run_folder,) = (cwd / "outputs" / "digits").iterdir()
    return run_folder


def test_torchrun_starts_one_run(folder):
    assert len(column(folder, "train/loss")) == 3
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert (folder / ".hydra" / "overrides.yaml").exists()


@pytest.mark.slow  # three processes that import everything
def test_an_evaluation_by_two_processes_is_that_of_one(folder, tmp_path):
    results = []
    for name, command in (("one", [sys.executable]), ("two", TWO)):
        options = [f"ckpt_path={folder / 'best.ckpt'}", "samples=2", "trainer.accelerator=cpu"]
        out = run(*command, ROOT / "src" / "evaluate.py", *options, f"hydra.run.dir={tmp_path / name}", cwd=tmp_path)
        assert out.count("importance-weighted bound") == 1
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    one, two = results
    assert one["samples"] == two["samples"] == 31
    assert one["bits_per_dim"] == pytest.approx(column(folder, "test/bits_per_dim")[0], abs=2e-5)
    for key in ("bits_per_dim", "standard_error_images", "bound", "midpoint", "kinetic", "transport_cost"):
        assert one[key] == pytest.approx(two[key], abs=2e-5), key
    tables = [(tmp_path / name / "samples.csv").read_text().splitlines() for name in ("one", "two")]
    assert [line.split(",")[0] for line in tables[0]] == [line.split(",")[0] for line in tables[1]]


@pytest.mark.slow  # three processes that import everything
def test_samples_by_two_processes_are_those_of_one(folder, tmp_path):
    drawn = []
    for name, command in (("one", [sys.executable, "SCRIPT"]), ("two", [sys.executable, "SCRIPT", "trainer.devices=2"])):
        command = [str(ROOT / "src" / "sample.py") if part == "SCRIPT" else part for part in command]
        options = [f"ckpt_path={folder / 'best.ckpt'}", "n=25", "dataset.eval_batch_size=10", "trainer.accelerator=cpu"]
        run(*command, *options, f"hydra.run.dir={tmp_path / name}", cwd=tmp_path)
        drawn.append(np.load(tmp_path / name / "samples.npy"))
    assert drawn[0].shape == (25, 1, 8, 8)
    assert np.array_equal(*drawn)


@pytest.mark.slow  # three processes that import torch
def test_another_number_of_devices_than_torchrun_started_gets_one_line(tmp_path):
    command = [*TWO, ROOT / "src" / "train.py", "trainer.devices=3", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode != 0
    assert "error: trainer.devices=3: must be 2, as torchrun has started, or left out (process 0)" in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_shares_of_the_processes_are_every_image_once():
    rows = torch.arange(11, dtype=torch.float32)[:, None]
    data = DataModule(lambda: Splits(rows, rows, rows), [1], 4, 3)
    data.setup()
    shares = [torch.cat([index for _, index in data.eval_dataloader(rows, rank, 3)]) for rank in range(3)]
    assert sorted(torch.cat(shares).tolist()) == list(range(11))
    for x, index in data.eval_dataloader(rows, 2, 3):
        assert torch.equal(x[:, 0].long(), index)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SLURM_PROCID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}, "slurm-77"),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2"}, "slurm-77.2"),
    ],
)
def test_a_slurm_job_is_named_by_its_number(monkeypatch, environment, name):
    from launch import launched, run_name

    environment |= {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run_name() == name
    assert launched()[2:] == (2, 2)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert launched() is None
