"""Jobs on a SLURM cluster with a partition `high` whose jobs preempt those in `low`.

eval "$(tests/slurm/cluster.sh start)"
pytest -n 0 -m slurm
tests/slurm/cluster.sh stop
"""

import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest

from helpers import ROOT, SMALL, assert_same_run, logged_step, metrics, succeed, wait_until

SBATCH = ROOT / "scripts" / "train.sbatch"
SHORT = [*SMALL, "trainer.limit_train_batches=20"]  # 60 steps
OFFLINE = "logger=wandb"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `rnode` is that of these tests
slurm = partial(succeed, PATH=PATH)
pytestmark = pytest.mark.slurm


class Job:
    """scripts/train.sbatch as a job in partition `low`, with `folder` as its working directory."""

    def __init__(self, folder, overrides, *options):
        place = [f"--chdir={folder}", f"--output={folder}/log", "--partition=low", "--parsable"]
        self.folder = folder
        self.id = slurm("sbatch", *place, *options, SBATCH, *overrides).strip()
        self.run = folder / "outputs" / "digits" / f"slurm-{self.id}"

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def show(self, key):
        return re.search(rf"\b{key}=(\S*)", slurm("scontrol", "show", "job", self.id))[1]

    def finish(self, state="COMPLETED"):
        going = ("PENDING", "RUNNING", "COMPLETING")
        wait_until(lambda: self.show("JobState") not in going, message=lambda: self.log[-3000:])
        assert self.show("JobState") == state, self.log[-3000:]
        assert "Traceback" not in self.log

    def stopped_by(self, name):
        """The training step after which the signal of this name stopped the run, the last time."""
        pattern = rf"^stopped: by {name} after (\d+) training steps"
        return int(re.findall(pattern, self.log, re.MULTILINE)[-1])


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory):
    """A job of two processes that nothing disturbed."""
    assert {"low", "high"} <= set(slurm("sinfo", "--noheader", "--format=%R").split()), __doc__
    job = Job(tmp_path_factory.mktemp("whole"), [*SHORT, OFFLINE])
    job.finish()
    return job


def test_two_tasks_make_one_run(whole_job):
    run = whole_job.run
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    found = {path for path in whole_job.folder.rglob("*") if path.suffix in (".ckpt", ".csv")}
    assert found == {run / name for name in ("best.ckpt", "last.ckpt", "metrics.csv")}
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    steps = [int(row["step"]) for row in metrics(run) if "train/bits_per_dim" in row]
    assert steps == list(range(60))
    assert "test/bits_per_dim" in metrics(run)[-1]
    assert whole_job.log.count("run folder:") == 2  # its first and its last lines


def test_a_preempted_job_is_requeued_and_resumes_to_the_same_end(whole_job, tmp_path):
    job = Job(tmp_path, SHORT)
    wait_until(lambda: logged_step(job.run) >= 10)
    slurm("srun", "--partition=high", "--ntasks=2", "sleep", "1")
    job.finish()
    assert job.show("Restarts") == "1"
    assert 10 < job.stopped_by("SIGTERM") < 60
    assert_same_run(job.run, whole_job.run)


def test_a_job_that_reaches_its_time_limit_is_requeued_and_resumes(whole_job, tmp_path):
    limit = ("--time=2", "--signal=SIGUSR1@60")  # SLURM sends it up to a minute too early
    job = Job(tmp_path, [*SMALL, "trainer.max_epochs=1000000"], *limit)
    wait_until(lambda: job.show("Restarts") != "0" and job.show("JobState") == "RUNNING")
    wait_until(lambda: logged_step(job.run) > job.stopped_by("SIGUSR1"))
    restarts = job.show("Restarts")  # more than one where the start takes most of the time
    slurm("scancel", job.id)
    job.finish("CANCELLED")
    assert job.show("Restarts") == restarts  # a cancelled job is not requeued
