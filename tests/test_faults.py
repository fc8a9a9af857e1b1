"""Runs that are interrupted, killed or broken, as processes: what they leave behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ONE_THREAD, SMALL, TRAIN, assert_same_run, last_step, process, wait_until

pytestmark = pytest.mark.slow(reason="runs in processes; test_resume.py stops runs in this one")
DDP = [*SMALL, "trainer.devices=2", "trainer.strategy=ddp"]
EVERY_7 = "callbacks.save.every_n_steps=7"


def error(run, code=1):
    """The one line by which a run says why it failed."""
    printed = run.finish(code)
    assert "Traceback" not in printed
    (line,) = (line for line in printed.splitlines() if line.startswith(("error: ", "stopped: ")))
    assert printed.strip().endswith(line)
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_an_interrupted_run_resumes_to_the_same_end(start, tmp_path, whole, number):
    folder = tmp_path / "run"
    options = [EVERY_7, "logger=wandb"]
    run = start(folder, *options)
    run.wait_for_step(50)
    os.kill(run.pid, number)
    if number == signal.SIGKILL:
        run.finish(code=-number)
    else:
        line = error(run, 128 + number)
        assert line.startswith(f"stopped: by {number.name} after ")
        assert "; to resume: rnode train model.hidden=4 " in line
        assert last_step(folder) > 50
    start(folder, *options, "ckpt_path=auto").finish()
    assert_same_run(folder, whole)


def test_kills_while_checkpoints_are_written_leave_whole_ones(start, tmp_path):
    folder, steps = tmp_path / "run", [0]
    epochs = "trainer.max_epochs=8"
    for kill in range(10):
        (folder / "last.ckpt.part").unlink(missing_ok=True)  # of the last kill
        run = start(folder, epochs, "ckpt_path=auto", "callbacks.save.every_n_steps=1")
        run.wait_until((folder / "last.ckpt.part").exists)
        time.sleep(kill % 3 * 0.2)
        run.wait_until((folder / "last.ckpt.part").exists)
        os.kill(run.pid, signal.SIGKILL)
        run.finish(code=-signal.SIGKILL)
        steps.append(last_step(folder) if (folder / "last.ckpt").exists() else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 5
    start(folder, epochs, "ckpt_path=auto").finish()
    start(tmp_path / "whole", epochs).finish()
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("file", ["last.ckpt", "metrics.csv", "samples.png"])
def test_a_full_disk_gets_one_line_and_leaves_the_earlier_file(start, tmp_path, whole, file):
    copy = shutil.copytree(whole, tmp_path / "run")
    before = (copy / file).read_bytes()
    (copy / f"{file}.part").symlink_to("/dev/full")
    more = ["ckpt_path=auto", "trainer.max_epochs=4", "callbacks.figures.every_n_epochs=1"]
    line = error(start(copy, *more))
    assert line.startswith(f"error: {copy / file} could not be written ([Errno 28] No space left")
    assert (copy / file).read_bytes() == before
    assert last_step(copy) == last_step(whole)
    assert not list(copy.glob("*.part"))


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(start, tmp_path, whole):
    folder = tmp_path / "run"
    first = start(folder)
    first.wait_for_step(35)
    os.kill(first.pid, signal.SIGSTOP)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    second = start(tmp_path / "second", f"hydra.run.dir={folder}", "seed=1", "ckpt_path=auto")
    line = error(second, 2)
    assert line.startswith(f"error: {folder}: another run is using this folder; wait until")
    assert before == [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    os.kill(first.pid, signal.SIGCONT)
    first.finish()
    assert_same_run(folder, whole)


def test_when_a_process_of_two_dies_the_other_stops(tmp_path):
    folder, printed = tmp_path / "run", tmp_path / "err"
    long = ["trainer.max_epochs=1000", EVERY_7, f"hydra.run.dir={folder}"]
    with open(printed, "w") as err:
        main = subprocess.Popen([*TRAIN, *DDP, *long], stdout=err, stderr=err, env=ONE_THREAD)
    wait_until((folder / "last.ckpt").exists, lambda: main.poll() is None, printed.read_text)
    (child,) = map(int, Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split())
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: main.poll() is not None)
    assert "error: " in printed.read_text()
    assert "Traceback" not in printed.read_text()
    assert last_step(folder) > 0


def test_a_run_that_diverges_in_one_process_stops_both(tmp_path):
    folder = tmp_path / "run"
    options = ["trainer.limit_train_batches=10", "optimizer.lr=0.008", "decay=false"]
    options += ["solver.gradient=checkpoint", f"hydra.run.dir={folder}"]
    done = process(sys.executable, Path(__file__).with_name("sick.py"), *DDP, *options)
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = (line for line in done.stderr.splitlines() if "at training step 12" in line)
    assert line.startswith("error: the gradient became NaN or infinite at training step 12; ")
    assert line.endswith(f"last good checkpoint: {folder}/last.ckpt")
    assert "Traceback" not in done.stderr
    assert last_step(folder) == 10
