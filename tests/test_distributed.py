"""Two processes over gloo, as torchrun and Lightning start them: one run, one gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import HANG, ROOT, column
from rnode.app.processes import launched, run_name

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


@pytest.mark.slow(reason="starts three processes")
def test_an_evaluation_by_two_processes_is_that_of_one(folder, tmp_path):
    results, indices = [], []
    for name, launcher in (("one", ONE), ("two", TWO)):
        options = [f"ckpt_path={folder / 'best.ckpt'}", "samples=2", "trainer.accelerator=cpu"]
        options.append(f"hydra.run.dir={tmp_path / name}")
        out = succeed(*launcher, ROOT / "src" / "evaluate.py", *options, cwd=tmp_path)
        assert out.count("importance-weighted bound") == 1
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
        lines = (tmp_path / name / "samples.csv").read_text().splitlines()
        indices.append([line.split(",")[0] for line in lines])
    one, two = results
    assert one["samples"] == two["samples"] == 31
    assert one["bits_per_dim"] == pytest.approx(column(folder, "test/bits_per_dim")[0], abs=2e-5)
    for key in ("bits_per_dim", "standard_error_images", "bound", "midpoint", "transport_cost"):
        assert one[key] == pytest.approx(two[key], abs=2e-5), key
    assert indices[0] == indices[1]


@pytest.mark.slow(reason="starts three processes")
def test_samples_by_two_processes_are_those_of_one(folder, tmp_path):
    samples = []
    for name, devices in (("one", 1), ("two", 2)):
        options = [f"ckpt_path={folder / 'best.ckpt'}", "n=25", "dataset.eval_batch_size=10"]
        options += ["trainer.accelerator=cpu", f"trainer.devices={devices}"]
        options.append(f"hydra.run.dir={tmp_path / name}")
        succeed(*ONE, ROOT / "src" / "sample.py", *options, cwd=tmp_path)
        samples.append(np.load(tmp_path / name / "samples.npy"))
    assert samples[0].shape == (25, 1, 8, 8)
    assert np.array_equal(*samples)


@pytest.mark.slow(reason="starts three processes")
def test_another_number_of_devices_than_torchrun_started_is_refused(tmp_path):
    options = ["trainer.devices=3", f"hydra.run.dir={tmp_path / 'run'}"]
    done = start(*TWO, ROOT / "src" / "train.py", *options, cwd=tmp_path)
    assert done.returncode != 0
    line = "error: trainer.devices=3: must be 2, as torchrun has started, or left out (process 0)"
    assert line in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))


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
    assert (launched().per_node, launched().nodes) == (2, 2)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert launched() is None
