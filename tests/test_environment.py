"""Runs in other people's surroundings: encodings, leftovers of other programs, names of folders."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from helpers import (
    HANG,
    ONE_THREAD,
    ROOT,
    TWO_STEPS,
    assert_same_run,
)
from rnode.app.processes import cluster_plugins, launched
from rnode.app.validation import quote

LEFTOVERS = {  # of SLURM, in the shell or notebook of a job
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "notebook",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
NAME = "λ é=[x] (1) ~"  # of a folder


@pytest.mark.slow(reason="processes that import everything")
def test_a_run_needs_nothing_of_its_surroundings(tmp_path):
    variables = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://of_a_notebook", **LEFTOVERS}
    environment = ONE_THREAD | variables
    folder = tmp_path / NAME
    arguments = [*TWO_STEPS, f"hydra.run.dir={quote(str(folder))}", "logger.wandb.mode=offline"]
    train = [sys.executable, ROOT / "src" / "train.py", *arguments]
    options = {"capture_output": True, "timeout": HANG, "check": False, "cwd": tmp_path}
    done = subprocess.run(train, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert b"Traceback" not in done.stdout + done.stderr
    assert (folder / "result.json").exists()
    assert "test/bits_per_dim" in done.stdout.decode("ascii", "replace")


@pytest.mark.slow(reason="a run stopped and resumed, beside a whole one")
def test_a_stopped_run_prints_a_command_that_works_when_pasted(start, whole, tmp_path):
    folder = tmp_path / NAME
    run = start(tmp_path / "run", f"hydra.run.dir={quote(str(folder))}")
    run.wait_until((folder / "metrics.csv").exists)
    os.kill(run.pid, signal.SIGTERM)
    printed = run.finish(128 + signal.SIGTERM)
    pasted = printed.strip().split("to resume: ")[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = f"cd {shlex.quote(str(tmp_path))} && {pasted}"
    options = {"shell": True, "capture_output": True, "text": True, "timeout": HANG}
    done = subprocess.run(shell, env=ONE_THREAD | {"PATH": path}, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(folder, whole)


def test_variables_of_slurm_count_only_where_srun_has_started_the_process(monkeypatch):
    for name, value in LEFTOVERS.items():
        monkeypatch.setenv(name, value)
    assert launched() is None
    assert [type(plugin) for plugin in cluster_plugins()] == [LightningEnvironment]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert launched() == "srun"
    assert [type(plugin) for plugin in cluster_plugins()] == [SLURMEnvironment]
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert launched() == "torchrun"
    assert cluster_plugins() == []
