"""Jobs on a SLURM cluster.

eval "$(tests/slurm/cluster.sh start)"
pytest -n 0 -m slurm
tests/slurm/cluster.sh stop

The cluster has the partitions `low` and `high`: a job in `high` preempts one in `low`, which SLURM
requeues.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from helpers import HANG, ROOT, SMALL, assert_same_run, rows

SBATCH = ROOT / "scripts" / "train.sbatch"
STEPS = 3 * 20  # of a run of SHORT
SHORT = [*SMALL, "trainer.limit_train_batches=20"]
PYTHON = Path(sys.executable).parent  # `python` in a job is that of these tests
ENVIRONMENT = os.environ | {"PATH": f"{PYTHON}:{os.environ['PATH']}"}


class Job:
    """scripts/train.sbatch as a job in partition `low`, with `folder` as its working directory."""

    def __init__(self, folder, overrides, *options):
        (folder / "src").symlink_to(ROOT / "src")
        place = [f"--chdir={folder}", f"--output={folder}/log", "--partition=low", "--parsable"]
        self.folder = folder
        self.id = slurm("sbatch", *place, *options, SBATCH, *overrides).strip()
        self.run = folder / "outputs" / "digits" / f"slurm-{self.id}"

    def show(self, key):
        return re.search(rf"\b{key}=(\S*)", slurm("scontrol", "show", "job", self.id))[1]

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def until(self, condition):
        deadline = time.monotonic() + HANG
        while not condition():
            assert time.monotonic() < deadline, self.show("JobState") + self.log[-3000:]
            time.sleep(0.1)

    def wait_for_step(self, step):
        def reached():
            if not (self.run / "metrics.csv").exists():
                return False
            return any(int(row.get("step", 0)) >= step for row in rows(self.run))

        self.until(reached)

    def finish(self, state="COMPLETED"):
        going = ("PENDING", "RUNNING", "COMPLETING")
        self.until(lambda: self.show("JobState") not in going)
        assert self.show("JobState") == state, self.log[-3000:]


def slurm(*command):
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return done.stdout


@pytest.fixture(scope="module")
def cluster():
    partitions = slurm("sinfo", "--noheader", "--format=%R").split()
    assert {"low", "high"} <= set(partitions), f"no cluster; {__doc__}"


@pytest.fixture(scope="module")
def whole_job(cluster, tmp_path_factory):
    """A job of two processes that nothing disturbed."""
    job = Job(tmp_path_factory.mktemp("whole"), [*SHORT, "wandb.mode=offline"])
    job.finish()
    return job


def test_the_docs_name_the_script_that_these_tests_run():
    page = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    assert f"sbatch {SBATCH.relative_to(ROOT)}" in page


@pytest.mark.slurm
def test_two_tasks_make_one_run(whole_job):
    run = whole_job.run
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    found = {path for path in whole_job.folder.rglob("*") if path.suffix in (".ckpt", ".csv")}
    assert found == {run / name for name in ("best.ckpt", "last.ckpt", "metrics.csv")}
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    steps = [int(row["step"]) for row in rows(run) if "train/bits_per_dim" in row]
    assert steps == list(range(STEPS))
    assert "test/bits_per_dim" in rows(run)[-1]
    assert whole_job.log.count("run folder:") == 1


@pytest.mark.slurm
def test_a_preempted_job_is_requeued_and_resumes_to_the_same_end(whole_job, tmp_path):
    job = Job(tmp_path, SHORT)
    job.wait_for_step(10)
    slurm("srun", "--partition=high", "--ntasks=2", "sleep", "1")
    job.finish()
    assert job.show("Restarts") == "1"
    stops = re.findall(r"^stopped: by SIGTERM after (\d+) training steps", job.log, re.MULTILINE)
    (stopped,) = set(stops)
    assert 10 < int(stopped) < STEPS
    assert "Traceback" not in job.log
    assert_same_run(job.run, whole_job.run)


@pytest.mark.slurm
def test_a_job_that_reaches_its_time_limit_is_requeued_and_resumes(cluster, tmp_path):
    limit = ("--time=2", "--signal=SIGUSR1@60")  # SLURM sends it up to a minute too early
    job = Job(tmp_path, [*SMALL, "trainer.max_epochs=1000000"], *limit)
    job.until(lambda: job.show("Restarts") == "1" and job.show("JobState") == "RUNNING")
    stops = re.findall(r"^stopped: by SIGUSR1 after (\d+) training steps", job.log, re.MULTILINE)
    (stopped,) = set(stops)
    job.wait_for_step(int(stopped) + 1)
    slurm("scancel", job.id)
    job.finish("CANCELLED")
    assert job.show("Restarts") == "1"  # a cancelled job is not requeued
    assert "Traceback" not in job.log


@pytest.mark.slurm
def test_a_sweep_by_submitit(cluster, tmp_path):
    partition = ["hydra.launcher.partition=low", "hydra.launcher.timeout_min=30"]
    launcher = ["hydra/launcher=submitit_slurm", *partition]
    script = ROOT / "src" / "train.py"
    done = subprocess.run(
        [sys.executable, script, "-m", *launcher, *SMALL, "reg.lambda_k=0,0.1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    for job, lambda_k in enumerate((0, 0.1)):
        run = folder / str(job)
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["reg"]["lambda_k"] == lambda_k
        assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 90
        assert "test/bits_per_dim" in rows(run)[-1]
    assert len(list(folder.glob(".submitit/*/*_result.pkl"))) == 2
