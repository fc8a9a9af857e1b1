"""Processes: runs in other people's surroundings, and two over gloo that make one run."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from helpers import SMALL, TRAIN, TWO_STEPS, Run, assert_same_run, column, process, succeed
from rnode.app.processes import cluster_plugins, launched
from rnode.app.validation import quote

LEFTOVERS = {  # of SLURM, in the shell or notebook of a job
    **{f"SLURM_{name}": "2" for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE", "NNODES")},
    **{f"SLURM_{name}": "0" for name in ("NODEID", "PROCID", "LOCALID")},
    "SLURM_JOB_NAME": "notebook",
}
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
NAME = "λ é=[x] (1) ~"  # of a folder


@pytest.mark.slow(reason="processes that import everything")
def test_a_run_needs_nothing_of_its_surroundings(tmp_path):
    folder = tmp_path / NAME
    variables = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://of_a_notebook", **LEFTOVERS}
    arguments = [*TWO_STEPS, f"hydra.run.dir={quote(str(folder))}", "logger=wandb"]
    done = process(*TRAIN, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert (folder / "result.json").exists()
    assert "test/bits_per_dim" in done.stdout


@pytest.mark.slow(reason="a run stopped and resumed, beside a whole one")
def test_a_stopped_run_prints_a_command_that_works_when_pasted(whole, tmp_path):
    folder = tmp_path / NAME
    run = Run(tmp_path / "run", f"hydra.run.dir={quote(str(folder))}", "logger=wandb")
    run.wait_until((folder / "metrics.csv").exists)
    os.kill(run.pid, signal.SIGTERM)
    printed = run.finish(128 + signal.SIGTERM)
    pasted = printed.strip().split("to resume: ")[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    succeed("sh", "-c", f"cd {shlex.quote(str(tmp_path))} && {pasted}", PATH=path)
    assert_same_run(folder, whole)


def test_variables_of_slurm_count_only_where_srun_has_started_the_process(monkeypatch):
    def started(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return launched(), [type(plugin) for plugin in cluster_plugins()]

    assert started(**LEFTOVERS) == (None, [LightningEnvironment])
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    assert started(**srun) == ("srun", [SLURMEnvironment])
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert started(**torchrun) == ("torchrun", [])


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
    options = [*SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    options += ["dataset.validation=31", "dataset.test=31", "logger=wandb"]
    out = succeed(*TWO, TRAIN[1], *options)
    assert out.count("test/bits_per_dim ") == 1
    (folder,) = (tmp_path / "outputs" / "digits").iterdir()
    assert len(column(folder, "train/loss")) == 3
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert (folder / ".hydra" / "overrides.yaml").exists()
