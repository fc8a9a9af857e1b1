"""Runs in other people's surroundings: encodings, leftovers of other programs, names of folders."""

import contextlib
import os
import pty
import re
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
    SMALL,
    TWO_STEPS,
    assert_same_run,
    call,
    refused,
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
@pytest.mark.parametrize(
    "variables",
    [
        pytest.param(
            {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://of_a_notebook", **LEFTOVERS},
            id="ascii",
        ),
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": None}, id="C"
        ),
        pytest.param({"PYTHONIOENCODING": "iso-8859-1", "MPLBACKEND": "no backend"}, id="latin"),
    ],
)
def test_a_run_needs_nothing_of_its_surroundings(tmp_path, variables):
    environment = {k: v for k, v in (ONE_THREAD | variables).items() if v is not None}
    folder = tmp_path / ("run" if "LC_ALL" in variables else NAME)
    arguments = [*TWO_STEPS, f"hydra.run.dir={quote(str(folder))}", "logger.wandb.mode=offline"]
    train = [sys.executable, ROOT / "src" / "train.py", *arguments]
    options = {"capture_output": True, "timeout": HANG, "check": False, "cwd": tmp_path}
    done = subprocess.run(train, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert b"Traceback" not in done.stdout + done.stderr
    assert (folder / "result.json").exists()
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert f"run folder: {folder}" in log
    assert "bits/dim (± standard error)" in log
    assert "bits/dim (" in done.stdout.decode("ascii", "replace")


@pytest.mark.slow(reason="a process on a terminal")
def test_a_terminal_shows_a_bar_and_the_log_holds_its_lines_alone(tmp_path):
    options = [
        *SMALL,
        "trainer.max_epochs=1",
        "callbacks.refine_grid=null",
        "trainer.enable_progress_bar=true",
    ]
    screen, terminal = pty.openpty()
    run = [sys.executable, ROOT / "src" / "train.py", *options, f"hydra.run.dir={tmp_path}"]
    columns = ONE_THREAD | {"COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen(run, stdout=terminal, stderr=terminal, env=columns) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the process has closed the terminal
            while part := os.read(screen, 65536):
                shown += part
    os.close(screen)
    assert process.returncode == 0
    assert b"\x1b[1A" not in shown  # the bar is one row, or its other rows would reach the log
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"epoch 1 of 1 ━+ 30/30 0:00:00 bits/dim: \d.* NFE: 24", plain)
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", log)
    assert re.search(r"^epoch 1 of 1, step 30: validation \d", log, re.MULTILINE)
    assert len(re.findall("epoch 1 of 1", log)) == 2  # the last state of the bar, and validation
    assert "bits/dim (± standard error)" in log


def test_the_log_holds_the_error_that_ended_the_run(capsys, tmp_path):
    wrong = ["optimizer.lr=1e30", "trainer.max_steps=9", f"hydra.run.dir={tmp_path}"]
    line, _ = refused(capsys, "train", *TWO_STEPS, *wrong)
    log = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert line.removeprefix("error: ") in log


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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.root=/data/a=b", """write 'dataset.root="/data/a=b"'"""),
        ("dataset.root=~/data", """write 'dataset.root="~/data"'"""),
        ("hydra.run.dir=out/a[1]", """write 'hydra.run.dir="out/a[1]"'"""),
        ("hydra.run.dir=/tmp/λ", """write 'hydra.run.dir="/tmp/λ"'"""),
        ("dataset.root=$(x)", """write 'dataset.root="$(x)"'"""),
    ],
)
def test_a_value_that_needs_quotes_is_shown_quoted(capsys, override, words):
    line, code = refused(capsys, "train", "dataset=mnist", override)
    assert line.startswith(f"error: {override}: ")
    assert words in line
    assert code == 2
    (argument,) = shlex.split(words.removeprefix("write "))
    line, _ = refused(capsys, "train", "dataset=mnist", argument, "seed=-1")
    assert "seed=-1" in line  # the argument itself is read


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


@pytest.mark.slow(reason="a run with W&B")
def test_wandb_takes_its_variables_where_the_command_line_says_nothing(tmp_path, monkeypatch):
    options = [option for option in TWO_STEPS if "wandb" not in option]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    call("train", *options, f"hydra.run.dir={tmp_path / 'a'}")
    assert not (tmp_path / "a" / "wandb").exists()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    call("train", *options, "logger.wandb.mode=offline", f"hydra.run.dir={tmp_path / 'b'}")
    assert "project: mine" in (tmp_path / "b" / "config.yaml").read_text()
    assert list(tmp_path.glob("elsewhere/wandb/offline-run-*"))
    assert not (tmp_path / "b" / "wandb").exists()
