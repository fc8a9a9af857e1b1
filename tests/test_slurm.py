"""Jobs on a SLURM cluster: eval "$(tests/slurm/cluster.sh start)"; pytest -n 0 -m slurm; tests/slurm/cluster.sh stop.

Needs the partitions `low` and `high`: a job in `high` takes the place of one in `low`, which is queued again.
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

from test_faults import SMALL, SOURCE, assert_same_run, rows

SBATCH = Path(__file__).parent / "slurm" / "train.sbatch"
STEPS = 3 * 20  # of the run that is preempted
SHORT = [*SMALL, "trainer.limit_train_batches=20"]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # its python is the one of these tests
    "PYTHONPATH": SOURCE,  # for what submitit unpickles
}


class Job:
    """train.sbatch as a job in partition `low`, its working directory `folder`."""

    def __init__(self, folder, overrides, *options):
        (folder / "src").symlink_to(SOURCE)
        options = [f"--chdir={folder}", f"--output={folder}/log", "--partition=low", "--parsable", *options]
        self.folder, self.id = folder, slurm("sbatch", *options, SBATCH, *overrides).strip()
        self.run = folder / "outputs" / "digits" / f"slurm-{self.id}"

    def show(self, key):
        return re.search(rf"\b{key}=(\S*)", slurm("scontrol", "show", "job", self.id))[1]

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def until(self, condition, seconds=300):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.show("JobState") + self.log[-3000:]
            time.sleep(0.1)

    def wait_for_step(self, step):
        table = self.run / "metrics.csv"
        self.until(lambda: table.exists() and any(int(row.get("step") or 0) >= step for row in rows(self.run)))

    def finish(self, state="COMPLETED"):
        self.until(lambda: self.show("JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
        assert self.show("JobState") == state, self.log[-3000:]


def slurm(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout


@pytest.fixture(scope="module")
def cluster():
    partitions = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True)
    assert {"low", "high"} <= set(partitions.stdout.split()), f"no cluster; {__doc__}"


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory):
    """A job of two processes that nobody disturbed."""
    job = Job(tmp_path_factory.mktemp("whole"), [*SHORT, "wandb.mode=offline"])
    job.finish()
    return job


def test_the_readme_has_the_sbatch_file_that_is_tried_here():
    assert f"```bash\n{SBATCH.read_text()}```" in (Path(SOURCE).parent / "README.md").read_text()


@pytest.mark.slurm
def test_two_tasks_make_one_run(whole):
    assert [path.name for path in whole.run.parent.iterdir()] == [whole.run.name]
    found = {path for path in whole.folder.rglob("*") if path.suffix in (".ckpt", ".csv")}
    assert found == {whole.run / name for name in ("best.ckpt", "last.ckpt", "metrics.csv")}
    assert len(list(whole.run.glob("wandb/offline-run-*"))) == 1
    assert [int(row["step"]) for row in rows(whole.run) if "train/bits_per_dim" in row] == list(range(STEPS))
    assert "test/bits_per_dim" in rows(whole.run)[-1]
    assert whole.log.count("run folder:") == 1


@pytest.mark.slurm
def test_a_preempted_job_is_requeued_and_goes_on_to_the_same_end(whole, tmp_path):
    job = Job(tmp_path, SHORT)
    job.wait_for_step(10)
    slurm("srun", "--partition=high", "--ntasks=2", "sleep", "1")
    job.finish()
    assert job.show("Restarts") == "1"
    (stopped,) = set(re.findall(r"^stopped: by SIGTERM after (\d+) training steps", job.log, re.MULTILINE))
    assert 10 < int(stopped) < STEPS
    assert "Traceback" not in job.log
    assert_same_run(job.run, whole.run)


@pytest.mark.slurm
def test_a_job_whose_time_is_up_is_requeued_and_goes_on(cluster, tmp_path):
    options = ("--time=2", "--signal=SIGUSR1@60")  # SLURM gives the signal up to a minute too early
    job = Job(tmp_path, [*SMALL, "trainer.max_epochs=1000000"], *options)
    job.until(lambda: job.show("Restarts") == "1" and job.show("JobState") == "RUNNING")
    (stopped,) = set(re.findall(r"^stopped: by SIGUSR1 after (\d+) training steps", job.log, re.MULTILINE))
    job.wait_for_step(int(stopped) + 1)
    slurm("scancel", job.id)
    job.finish("CANCELLED")
    assert job.show("Restarts") == "1"  # who cancels a job does not want it again
    assert "Traceback" not in job.log


@pytest.mark.slurm
def test_a_sweep_by_submitit(cluster, tmp_path):
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=10"]
    command = [sys.executable, f"{SOURCE}/train.py", "-m", *launcher, *SMALL, "reg.lambda_k=0,0.1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    for job, lambda_k in enumerate((0, 0.1)):
        run = folder / str(job)
        assert yaml.safe_load((run / "config.yaml").read_text())["reg"]["lambda_k"] == lambda_k
        assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 90
        assert "test/bits_per_dim" in rows(run)[-1]
    assert len(list(folder.glob(".submitit/*/*_result.pkl"))) == 2
