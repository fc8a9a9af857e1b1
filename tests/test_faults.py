"""Runs that are interrupted, killed or broken, as processes: what they leave behind."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from helpers import SMALL, Run, assert_same_run, last_step, process, wait_until

pytestmark = pytest.mark.slow(reason="runs in processes; test_resume.py stops runs in this one")
DDP = ["trainer.devices=2", "trainer.strategy=ddp"]


def test_kills_while_checkpoints_are_written_leave_whole_ones(tmp_path):
    folder, steps = tmp_path / "run", [0]
    epochs = "trainer.max_epochs=8"
    for kill in range(6):
        (folder / "last.ckpt.part").unlink(missing_ok=True)  # of the last kill
        run = Run(folder, epochs, "ckpt_path=auto", "callbacks.save.every_n_steps=1")
        run.wait_until((folder / "last.ckpt.part").exists)
        time.sleep(kill % 3 * 0.2)
        run.wait_until((folder / "last.ckpt.part").exists)
        os.kill(run.pid, signal.SIGKILL)
        run.finish(code=-signal.SIGKILL)
        steps.append(last_step(folder) if (folder / "last.ckpt").exists() else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 2
    Run(folder, epochs, "ckpt_path=auto").finish()
    Run(tmp_path / "whole", epochs).finish()
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("file", ["last.ckpt", "metrics.csv", "samples.png"])
def test_a_full_disk_gets_one_line_and_leaves_the_earlier_file(tmp_path, whole, file):
    copy = shutil.copytree(whole, tmp_path / "run")
    before = (copy / file).read_bytes()
    (copy / f"{file}.part").symlink_to("/dev/full")
    more = ["ckpt_path=auto", "trainer.max_epochs=4", "callbacks.figures.every_n_epochs=1"]
    printed = Run(copy, *more).finish(code=1)
    assert "Traceback" not in printed
    assert f"\nerror: {copy / file} could not be written ([Errno 28] No space left" in printed
    assert (copy / file).read_bytes() == before
    assert last_step(copy) == last_step(whole)
    assert not list(copy.glob("*.part"))


def test_when_a_process_of_two_dies_the_other_stops(tmp_path):
    run = Run(tmp_path / "run", *DDP, "trainer.max_epochs=1000", "callbacks.save.every_n_steps=7")
    run.wait_until((run.folder / "last.ckpt").exists)
    (child,) = map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: run.process.poll() is not None)
    printed = run.err.read_text()
    assert "error: " in printed
    assert "Traceback" not in printed
    assert last_step(run.folder) > 0


def test_a_run_that_diverges_in_one_process_stops_both(tmp_path):
    folder = tmp_path / "run"
    options = ["trainer.limit_train_batches=10", "optimizer.lr=0.008", "decay=false"]
    options += ["solver.gradient=checkpoint", f"hydra.run.dir={folder}"]
    done = process(sys.executable, Path(__file__).with_name("sick.py"), *SMALL, *DDP, *options)
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = (line for line in done.stderr.splitlines() if "at training step 12" in line)
    assert line.startswith("error: the gradient became NaN or infinite at training step 12; ")
    assert line.endswith(f"last good checkpoint: {folder}/last.ckpt")
    assert "Traceback" not in done.stderr
    assert last_step(folder) == 10
