"""Runs that are interrupted, killed or broken, as processes: what they leave behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_files import wandb_records
from helpers import (
    HANG,
    ONE_THREAD,
    ROOT,
    SMALL,
    alive,
    assert_same_run,
    curves,
    refused,
    same,
    wait_until,
)

pytestmark = pytest.mark.slow(reason="runs in processes; test_resume.py stops runs in this one")
DDP = [*SMALL, "trainer.devices=2", "trainer.strategy=ddp"]


def last_step(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def error(run, code=1):
    """The one line by which a run says why it failed."""
    printed = run.finish(code)
    assert "Traceback" not in printed
    (line,) = (line for line in printed.splitlines() if line.startswith(("error: ", "stopped: ")))
    assert printed.strip().endswith(line)
    return line


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the folder `whole`, whose run ended at step 90."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("step", "number"),
    [(40, signal.SIGTERM), (3, signal.SIGINT), (65, signal.SIGUSR1), (50, signal.SIGKILL)],
)
def test_an_interrupted_run_resumes_to_the_same_end(start, tmp_path, whole, step, number):
    folder = tmp_path / "run"
    run = start(folder, "callbacks.save.every_n_steps=7")
    run.wait_for_step(step)
    os.kill(run.pid, number)
    if number == signal.SIGKILL:
        run.finish(code=-number)
    else:
        line = error(run, 128 + number)
        assert line.startswith(f"stopped: by {number.name} after ")
        assert f"{folder / 'last.ckpt'}; to resume: rnode train model.hidden=4 " in line
        assert last_step(folder) > step
    start(folder, "callbacks.save.every_n_steps=7", "ckpt_path=auto").finish()
    assert_same_run(folder, whole)


def test_kills_while_checkpoints_are_written_leave_whole_ones(start, tmp_path):
    folder, steps = tmp_path / "run", [0]
    epochs = "trainer.max_epochs=8"
    for kill in range(15):
        (folder / "last.ckpt.part").unlink(missing_ok=True)  # of the last kill
        run = start(folder, epochs, "ckpt_path=auto", "callbacks.save.every_n_steps=1")
        run.wait_until((folder / "last.ckpt.part").exists)
        time.sleep(kill % 3 * 0.2)
        run.wait_until((folder / "last.ckpt.part").exists)
        os.kill(run.pid, signal.SIGKILL)
        run.finish(code=-signal.SIGKILL)
        steps.append(last_step(folder) if (folder / "last.ckpt").exists() else 0)
    assert steps == sorted(steps)
    assert steps[-1] > 10
    start(folder, epochs, "ckpt_path=auto").finish()
    start(tmp_path / "whole", epochs).finish()
    same(*(torch.load(f / "last.ckpt", weights_only=True) for f in (folder, tmp_path / "whole")))


@pytest.mark.parametrize(
    "file", ["last.ckpt", "best.ckpt", "metrics.csv", "config.yaml", "samples.png"]
)
def test_a_full_disk_gets_one_line_and_leaves_the_earlier_file(start, copy, file):
    before = (copy / file).read_bytes()
    (copy / f"{file}.part").symlink_to("/dev/full")
    more = ["ckpt_path=auto", "trainer.max_epochs=4", "callbacks.figures.every_n_epochs=1"]
    line = error(start(copy, *more))
    assert line.startswith(f"error: {copy / file} could not be written ([Errno 28] No space left")
    assert line.endswith("the earlier file is intact")
    assert (copy / file).read_bytes() == before
    assert last_step(copy) == 90
    assert not list(copy.glob("*.part"))


def test_a_run_whose_curves_cannot_grow_stops_and_resumes(start, copy, whole):
    size = (copy / "metrics.csv").stat().st_size
    more = ["callbacks.best=null", "callbacks.save=null", "trainer.limit_val_batches=0"]
    more += ["ckpt_path=auto"]
    run = start(copy, *more, "trainer.max_epochs=4", largest_file=size + 500)
    line = error(run)
    assert line.startswith(f"error: {copy / 'metrics.csv'} could not be written ([Errno 27] File")
    for folder in (copy, shutil.copytree(whole, copy.with_name("other"))):
        start(folder, "trainer.max_epochs=4", "ckpt_path=auto").finish()
    assert curves(copy) == curves(copy.with_name("other"))  # its last row had been cut short


def test_a_folder_that_becomes_read_only_gets_one_line(start, tmp_path):
    folder, epochs = tmp_path / "run", "trainer.max_epochs=100"
    run = start(folder, epochs, "callbacks.save.every_n_steps=7", unprivileged=True)
    run.wait_for_step(31)
    folder.chmod(0o555)
    line = error(run)
    assert re.match(rf"error: {folder}/(best|last).ckpt could not be written .*Permission", line)
    step = last_step(folder)
    assert step >= 28
    again = [folder, epochs, f"trainer.max_steps={step + 2}", "ckpt_path=auto"]
    line = error(start(*again, unprivileged=True))
    assert re.match(rf"error: .*{folder}/.*", line)
    folder.chmod(0o755)
    start(*again, unprivileged=True).finish()
    assert last_step(folder) == step + 2


def test_a_signal_closes_the_wandb_run_and_its_curves_continue(start, tmp_path):
    folder = tmp_path / "run"
    run = start(folder, "logger.wandb.mode=offline")
    run.wait_for_step(40)
    os.kill(run.pid, signal.SIGTERM)
    run.finish(code=128 + signal.SIGTERM)
    stopped = last_step(folder)
    start(folder, "logger.wandb.mode=offline", "ckpt_path=auto").finish()
    for records, expected in zip(
        wandb_records(folder).values(), (range(stopped), range(stopped, 90)), strict=True
    ):
        rows = [
            {i.key or "/".join(i.nested_key): i.value_json for i in r.history.item} for r in records
        ]
        steps = [int(row["trainer/global_step"]) for row in rows if "train/loss" in row]
        assert steps == list(expected)
        assert any(record.HasField("exit") for record in records)
    assert len({name.rsplit("-", 1)[1] for name in wandb_records(folder)}) == 1


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(start, tmp_path, whole):
    folder = tmp_path / "run"
    first = start(folder)
    first.wait_for_step(35)
    os.kill(first.pid, signal.SIGSTOP)
    before = contents(folder)
    second = start(tmp_path / "second", f"hydra.run.dir={folder}", "seed=1", "ckpt_path=auto")
    line = error(second, 2)
    assert line.startswith(f"error: {folder}: another run is using this folder; wait until")
    assert contents(folder) == before
    os.kill(first.pid, signal.SIGCONT)
    first.finish()
    assert_same_run(folder, whole)


def test_of_runs_started_at_once_one_gets_the_folder(start, tmp_path):
    """Unless each has the folder of its own time."""
    few = "trainer.max_steps=2"
    runs = [start(tmp_path / name, few, f"hydra.run.dir={tmp_path / 'run'}") for name in "ab"]
    assert sorted(run.ask({"wait": run.pid}) for run in runs) == [0, 2]
    own = f"hydra.run.dir={tmp_path}/own/${{run_name:}}"
    for run in [start(tmp_path / name, few, own) for name in "cd"]:
        run.finish()
    assert len(list(tmp_path.glob("own/*/last.ckpt"))) == 2


def test_a_new_run_does_not_overwrite_the_checkpoints_of_an_earlier_one(capsys, copy):
    elsewhere = shutil.copy(copy / "last.ckpt", copy.with_name("elsewhere.ckpt"))
    before = contents(copy)
    for overrides in ([], [f"ckpt_path={elsewhere}"]):
        line, code = refused(capsys, "train", *SMALL, *overrides, f"hydra.run.dir={copy}")
        assert f"{copy / 'last.ckpt'} is from an earlier run: ckpt_path=auto resumes that" in line
        assert code == 2
    assert contents(copy) == before


def test_memory_and_open_files_do_not_grow_over_500_steps(start, tmp_path):
    """With validation, checkpoints and pictures every 50 steps, and W&B."""
    toy = ["dataset=toy", "model=mlp", "solver.gradient=adjoint", "logger.wandb.mode=offline"]
    often = [
        "trainer.limit_train_batches=50",
        "trainer.max_epochs=12",
        "callbacks.figures.every_n_epochs=1",
    ]
    run = start(tmp_path / "run", *toy, *often)
    resident, files = [], []
    for step in (52, 552):
        run.wait_for_step(step)
        status = Path(f"/proc/{run.pid}/status").read_text()
        resident.append(int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]))
        files.append(len(list(Path(f"/proc/{run.pid}/fd").iterdir())))
    run.finish()
    assert resident[1] < 1.02 * resident[0], resident
    assert files[0] == files[1]


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_of_two_dies_the_other_stops(tmp_path, victim):
    folder = tmp_path / "run"
    train = [sys.executable, ROOT / "src" / "train.py", *DDP, f"hydra.run.dir={folder}"]
    with open(tmp_path / "err", "w") as err:
        long = ["trainer.max_epochs=1000", "callbacks.save.every_n_steps=5"]
        main = subprocess.Popen([*train, *long], stdout=err, stderr=err, env=ONE_THREAD)
    going = {"running": lambda: main.poll() is None, "message": (tmp_path / "err").read_text}
    wait_until((folder / "last.ckpt").exists, **going)
    (child,) = map(int, Path(f"/proc/{main.pid}/task/{main.pid}/children").read_text().split())
    os.kill((main.pid, child)[victim], signal.SIGKILL)
    wait_until(lambda: main.poll() is not None and not alive(child))
    printed = (tmp_path / "err").read_text()
    assert "error: " in printed
    assert "Traceback" not in printed
    assert last_step(folder) > 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", "z of piece 1 became NaN .*at training step 12"),
        ("forward", "max_num_steps exceeded .*in piece 1 at training step 12"),
        ("backward", "underflow .*in the gradient of piece 2 at training step 12"),
    ],
)
def test_a_fault_in_one_process_stops_both(tmp_path, fault, words):
    folder = tmp_path / "run"
    train = [sys.executable, Path(__file__).with_name("sick.py"), *DDP, f"hydra.run.dir={folder}"]
    train += ["trainer.max_epochs=2", "trainer.limit_train_batches=10"]
    train += ["optimizer.lr=0.008", "decay=false", "solver.gradient=checkpoint"]
    options = {"capture_output": True, "text": True, "timeout": HANG}
    done = subprocess.run(train, check=False, env=ONE_THREAD | {"SICK": fault}, **options)
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = (line for line in done.stderr.splitlines() if "at training step 12" in line)
    assert re.search(
        f"error: .*{words}.*; try a smaller .* last good checkpoint: .*last.ckpt", line
    )
    assert "Traceback" not in done.stderr
    assert last_step(folder) == 10
