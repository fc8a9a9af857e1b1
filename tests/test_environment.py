"""Runs in other people's surroundings: encodings, leftovers of other programs, names of folders."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from helpers import TRAIN, TWO_STEPS, assert_same_run, process, succeed
from rnode.app.processes import cluster_plugins, launched
from rnode.app.validation import quote

LEFTOVERS = {  # of SLURM, in the shell or notebook of a job
    **{f"SLURM_{name}": "2" for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE", "NNODES")},
    **{f"SLURM_{name}": "0" for name in ("NODEID", "PROCID", "LOCALID")},
    "SLURM_JOB_NAME": "notebook",
}
NAME = "λ é=[x] (1) ~"  # of a folder


@pytest.mark.slow(reason="processes that import everything")
def test_a_run_needs_nothing_of_its_surroundings(tmp_path):
    folder = tmp_path / NAME
    variables = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://of_a_notebook", **LEFTOVERS}
    arguments = [*TWO_STEPS, f"hydra.run.dir={quote(str(folder))}", "logger.wandb.mode=offline"]
    done = process(*TRAIN, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert (folder / "result.json").exists()
    assert "test/bits_per_dim" in done.stdout


@pytest.mark.slow(reason="a run stopped and resumed, beside a whole one")
def test_a_stopped_run_prints_a_command_that_works_when_pasted(start, whole, tmp_path):
    folder = tmp_path / NAME
    run = start(tmp_path / "run", f"hydra.run.dir={quote(str(folder))}")
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
