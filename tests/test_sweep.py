"""Sweeps: one job after another, in parallel, guided; with jobs that fail; stopped and resumed."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers import TWO_STEPS, Run, alive, assert_same_run, call, column, last_step, wait_until
from rnode.errors import Diverged
from rnode.training.module import RNODE

TINY = [*TWO_STEPS, "model.pieces=1"]
NEGATIVE = "reg.lambda_k=-1: Input should be greater than or equal to 0"


def results(folder):
    paths = folder.glob("*/result.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def table(folder):
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


def statuses(folder):
    return [row["status"] for row in table(folder)]


def failing(capsys, *overrides):
    """Run a sweep of which some jobs fail, and return what it prints."""
    with pytest.raises(SystemExit) as stop:
        call("train", "-m", *TINY, *overrides)
    assert stop.value.code == 1
    return capsys.readouterr()


def break_where(monkeypatch, find_error):
    """Let training raise what `find_error(module)` returns, if anything."""

    begin = RNODE.on_train_start

    def start(self):
        error = find_error(self)
        if error is not None:
            raise error
        begin(self)

    monkeypatch.setattr(RNODE, "on_train_start", start)


def test_failed_jobs_are_reported_and_do_not_stop_the_others(tmp_path, capsys, monkeypatch):
    errors = {0.5: KeyError("broken"), 0.7: Diverged("the loss became NaN")}
    break_where(monkeypatch, lambda module: errors.get(module.lambda_j))
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "failed.txt").write_text("of an earlier attempt")
    swept = ["reg.lambda_j=0.5,-1,0.1,0.7", "reg.lambda_k=0.2"]
    printed = failing(capsys, *swept, f"hydra.sweep.dir={tmp_path}")
    broken, negative, diverged = printed.err.strip().splitlines()[-3:]
    assert negative.startswith("failed: 1 reg.lambda_j=-1: reg.lambda_j=-1: Input should ")
    log = tmp_path / "0" / "error.log"
    assert broken == f"failed: 0 reg.lambda_j=0.5: KeyError: 'broken'; the traceback is in {log}"
    assert "in start" in log.read_text()
    assert diverged.startswith("diverged: 3 reg.lambda_j=0.7: the loss became NaN; ")
    assert "Traceback" not in printed.err
    assert list(results(tmp_path)) == ["2"]
    rows = table(tmp_path)
    assert statuses(tmp_path) == ["failed", "failed", "finished", "diverged"]
    assert [row["reg.lambda_j"] for row in rows] == ["0.5", "-1", "0.1", "0.7"]
    assert "reg.lambda_k" not in rows[2]  # the same in all jobs
    bits = results(tmp_path)["2"]["val/bits_per_dim"]
    assert [row["val/bits_per_dim"] for row in rows] == ["", "", str(bits), ""]
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert f"{bits:.4f}" in printed.out


@pytest.mark.slow(reason="four sweeps")
def test_a_repeated_sweep_skips_resumes_or_refuses_its_jobs(tmp_path, capsys):
    arguments = ["-m", *TINY, f"hydra.sweep.dir={tmp_path}", "reg.lambda_k=0,0.1"]
    call("train", *arguments)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*.[cjmy]*")}
    first = results(tmp_path)
    assert len(first) == 2
    logged = [text.replace("logger=csv", "logger.wandb.mode=disabled") for text in arguments]
    call("train", *logged, "ckpt_path=auto")
    assert capsys.readouterr().out.count("skipped") == 2
    printed = failing(capsys, f"hydra.sweep.dir={tmp_path}", "reg.lambda_k=0,0.2")
    reason = f"{tmp_path / '1'}: holds a run with another reg.lambda_k; use another folder"
    lines = printed.err.strip().splitlines()
    assert f"error: {reason}" in lines
    assert lines[-1] == f"failed: 1 reg.lambda_k=0.1: {reason}"
    assert printed.out.count("skipped") == 1
    assert before == {path: path.read_bytes() for path in before}
    call("train", *arguments, "trainer.max_steps=3", "trainer.max_epochs=2")
    assert statuses(tmp_path) == ["finished", "finished"]
    assert [last_step(tmp_path / name) for name in "01"] == [3, 3]
    assert len(column(tmp_path / "0", "train/loss")) == 3
    assert all(results(tmp_path)[name] != first[name] for name in first)


@pytest.mark.slow(reason="a run and two sweeps")
def test_a_sweep_that_stops_in_its_second_job_resumes_to_the_same_end(tmp_path):
    folder = tmp_path / "sweep"
    every = ["trainer.max_epochs=1", "callbacks.save.every_n_steps=5"]
    arguments = [*every, f"hydra.sweep.dir={folder}", "reg.lambda_k=0,0.1,0.2", "-m"]
    run = Run(tmp_path / "first", *arguments)
    run.wait_until((folder / "1" / "last.ckpt").exists)
    os.kill(run.pid, signal.SIGINT)
    printed = run.finish(code=128 + signal.SIGINT)
    assert results(folder).keys() == {"0"}
    assert not (folder / "2").exists()
    assert "\nstopped: by SIGINT after " in printed
    assert printed.endswith(f"to resume the sweep, add folder={folder}\n")
    before = (folder / "0" / "last.ckpt").stat().st_mtime_ns
    assert 5 <= last_step(folder / "1") < 30
    printed = Run(tmp_path / "second", *arguments).finish()
    assert printed.count("skipped") == 1
    assert (folder / "0" / "last.ckpt").stat().st_mtime_ns == before
    Run(tmp_path / "whole", *every, "reg.lambda_k=0.1").finish()
    assert_same_run(folder / "1", tmp_path / "whole")
    assert statuses(folder) == ["finished"] * 3


@pytest.mark.slow(reason="two workers of joblib import everything, twice")
def test_joblib_runs_two_jobs_at_a_time_which_stop_with_the_sweep(tmp_path):
    folder = tmp_path / "sweep"
    arguments = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={folder}"]
    arguments += ["trainer.limit_train_batches=40", "dataset.batch_size=32", "trainer.max_epochs=1"]
    arguments += ["callbacks.save.every_n_steps=5", "reg.lambda_k=0,0.1,-1", "-m"]
    run = Run(tmp_path / "first", *arguments)
    run.wait_until(lambda: all((folder / name / "last.ckpt").exists() for name in "01"))
    children = descendants(run.pid)
    assert not results(folder)
    for pid in (run.pid, *children):  # as Ctrl-C does
        os.kill(pid, signal.SIGINT)
    run.finish(code=-signal.SIGINT)
    wait_until(lambda: not any(alive(pid) for pid in children))
    assert all(5 <= last_step(folder / name) < 40 for name in "01")
    assert not (folder / "2" / "last.ckpt").exists()
    printed = Run(tmp_path / "second", *arguments).finish(code=1)
    assert "Traceback" not in printed
    assert printed.endswith(f"failed: 2 reg.lambda_k=-1: {NEGATIVE}\n")
    assert [len(column(folder / name, "train/loss")) for name in "01"] == [40, 40]
    assert statuses(folder) == ["finished", "finished", "failed"]


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [below for child in map(int, children) for below in (child, *descendants(child))]


@pytest.mark.slow(reason="two sweeps")
def test_a_guided_sweep_survives_a_failure_and_is_repeatable(tmp_path, capsys, monkeypatch):
    arguments = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={tmp_path}"]
    arguments += ["reg.lambda_k=interval(0.0,1.0)"]
    errors = iter([None, KeyError("broken"), None])
    with monkeypatch.context() as patch:
        break_where(patch, lambda module: next(errors))
        printed = failing(capsys, *arguments)
    assert "KeyError: 'broken'" in printed.err.strip().splitlines()[-1]
    first = results(tmp_path)
    assert first.keys() == {"0", "2"}
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == min(found["val/bits_per_dim"] for found in first.values())
    places = [row["reg.lambda_k"] for row in table(tmp_path)]
    assert len(set(places)) == 3
    call("train", "-m", *TINY, *arguments)
    assert capsys.readouterr().out.count("skipped") == 2
    assert places == [row["reg.lambda_k"] for row in table(tmp_path)]
    assert results(tmp_path).keys() == {"0", "1", "2"}


def test_a_job_may_not_start_processes(tmp_path, capsys):
    several = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    printed = failing(capsys, *several, "reg.lambda_k=0,0.1", f"hydra.sweep.dir={tmp_path}")
    assert printed.err.count("error: trainer.devices=2: must be 1 in a sweep") == 2
    assert not list(tmp_path.glob("*/*.ckpt"))
