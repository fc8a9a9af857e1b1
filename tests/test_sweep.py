"""Sweeps as a user starts them: in order, in parallel, guided; with jobs that fail; killed, and started again."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import sweep
import test_faults
from rnode.module import RNODE
from test_faults import alive, rows, same
from test_scripts import call
from test_train import TWO_STEPS

start = test_faults.start
TINY = [*TWO_STEPS, "model.pieces=1"]


def results(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


def table(folder):
    with open(folder / "sweep.csv", newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def failing(capsys, *overrides):
    """What a sweep prints of which some jobs fail, and that its exit code is 1."""
    with pytest.raises(SystemExit) as stop:
        call("train", "-m", *TINY, *overrides)
    assert stop.value.code == 1
    return capsys.readouterr()


def break_where(monkeypatch, condition):
    """Training raises an error of no class of ours in the modules for which `condition` is true."""
    healthy = RNODE.training_step

    def step(self, batch, batch_idx):
        if condition(self):
            raise KeyError("broken")
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", step)


def test_jobs_that_fail_leave_the_others_alone_and_are_named_at_the_end(tmp_path, capsys, monkeypatch):
    break_where(monkeypatch, lambda module: module.lambda_j == 0.5)
    printed = failing(capsys, "reg.lambda_j=-1,0.5,0.1", "reg.lambda_k=0.2", f"hydra.sweep.dir={tmp_path}")
    lines = printed.err.strip().splitlines()
    assert lines[-2:] == [
        "failed: 0 reg.lambda_j=-1: reg.lambda_j=-1: must be a number, 0 or more",
        "failed: 1 reg.lambda_j=0.5: KeyError: 'broken'",
    ]
    assert printed.err.count("Traceback") == 1  # of the error that is not the user's
    assert list(results(tmp_path)) == ["2"]
    shown = table(tmp_path)
    assert [shown[name]["status"] for name in "012"] == ["failed", "failed", "finished"]
    assert [shown[name]["reg.lambda_j"] for name in "012"] == ["-1", "0.5", "0.1"]
    assert "reg.lambda_k" not in shown["2"]  # the same for all
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert "val bits/dim" in printed.out


def test_a_result_is_what_metrics_csv_has(tmp_path):
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=3", "trainer.limit_train_batches=2", "optimizer.lr=0.3"]
    call("train", *TINY, *epochs, f"hydra.run.dir={tmp_path}")
    found = json.loads((tmp_path / "result.json").read_text())
    recorded = rows(tmp_path)
    validated = [row for row in recorded if "val/bits_per_dim" in row]
    assert len(validated) == 3
    best = min(validated, key=lambda row: float(row["val/bits_per_dim"]))
    assert found["val/bits_per_dim"] == pytest.approx(float(best["val/bits_per_dim"]), rel=1e-6)
    assert found["val/nfe_forward"] == float(best["val/nfe_forward"])
    seconds = [float(row["train/seconds_per_epoch"]) for row in recorded if "train/seconds_per_epoch" in row]
    assert found["train/seconds"] == pytest.approx(sum(seconds))
    assert len(seconds) == 3
    tested = recorded[-1] | next(row for row in recorded if "test/bits_per_dim" in row)
    for name in sweep.TESTED:
        assert found[name] == pytest.approx(float(tested[name]), rel=1e-6), name
    assert found["train/nfe_forward"] == 24


def test_started_again_a_sweep_skips_what_is_finished_and_goes_on_to_new_limits(tmp_path, capsys):
    arguments = ["-m", *TINY, "reg.lambda_k=0,0.1", f"hydra.sweep.dir={tmp_path}"]
    call("train", *arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.*") if path.suffix != ".log"}
    first = results(tmp_path)
    assert len(first) == 2
    capsys.readouterr()
    call("train", *arguments, "wandb.project=other", "pictures.samples=9", "ckpt_path=auto")
    printed = capsys.readouterr()
    assert printed.out.count("is finished, and skipped") == 2
    assert "val bits/dim" in printed.out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    call("train", *arguments, "trainer.max_steps=3", "trainer.max_epochs=2")
    steps = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["global_step"] for name in "01"]
    assert steps == [3, 3]
    assert [int(row["step"]) for row in rows(tmp_path / "0") if "train/loss" in row] == [0, 1, 2]
    assert results(tmp_path).keys() == first.keys()
    assert all(results(tmp_path)[name] != first[name] for name in first)


def test_a_folder_with_a_run_of_another_configuration_is_refused_and_left_as_it_is(tmp_path, capsys):
    call("train", "-m", *TINY, "reg.lambda_k=0,0.1", f"hydra.sweep.dir={tmp_path}")
    before = {path: path.read_bytes() for name in ("result.json", "last.ckpt") for path in tmp_path.glob(f"*/{name}")}
    assert len(before) == 4
    capsys.readouterr()
    printed = failing(capsys, "reg.lambda_k=0,0.2", f"hydra.sweep.dir={tmp_path}")
    words = f"{tmp_path / '1'}: holds a run of another configuration (reg.lambda_k is 0.1 there and 0.2 here)"
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: job 1: ")]
    assert words in line
    assert printed.err.strip().splitlines()[-1].startswith("failed: 1 reg.lambda_k=0.1: ")
    assert printed.out.count("is finished, and skipped") == 1
    assert before == {path: path.read_bytes() for path in before}
    call("train", "-m", *TINY, "reg.lambda_k=0,0.1", f"hydra.sweep.dir={tmp_path}")  # the folder is that run's again
    assert {row["status"] for row in table(tmp_path).values()} == {"finished"}


@pytest.mark.slow  # three runs and a sweep
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_in_its_second_job_goes_on_to_the_same_end(start, tmp_path, number):
    folder = tmp_path / "sweep"
    arguments = ["trainer.max_epochs=1", "save_every_n_steps=5", f"hydra.sweep.dir={folder}", "reg.lambda_k=0,0.1,0.2", "-m"]
    run = start(tmp_path / "first", *arguments)
    run.folder = folder / "1"
    run.wait_for_step(12)
    os.kill(run.pid, number)
    printed = run.finish(code=-number if number == signal.SIGKILL else 128 + number)
    assert not (folder / "2").exists()
    assert not (folder / "1" / "result.json").exists()
    if number == signal.SIGINT:
        line = printed.strip().splitlines()[-1]
        assert line.startswith("stopped: by SIGINT after ")
        assert line.endswith(f"give its command hydra.sweep.dir={folder}")
    before = (folder / "0" / "last.ckpt").stat().st_mtime_ns
    reached = torch.load(folder / "1" / "last.ckpt", weights_only=True)["global_step"]
    assert 10 <= reached < 30
    printed = start(tmp_path / "second", *arguments).finish()
    assert printed.count("is finished, and skipped") == 1
    assert (folder / "0" / "last.ckpt").stat().st_mtime_ns == before
    start(tmp_path / "whole", "trainer.max_epochs=1", "save_every_n_steps=5", "reg.lambda_k=0.1").finish()
    ends = [torch.load(path / "last.ckpt", weights_only=True) for path in (folder / "1", tmp_path / "whole")]
    same(*({key: end[key] for key in ("state_dict", "optimizer_states", "global_step")} for end in ends))
    steps = [int(row["step"]) for row in rows(folder / "1") if "train/loss" in row]
    assert steps == list(range(30))
    assert [row["status"] for row in table(folder).values()] == ["finished"] * 3


@pytest.mark.slow  # joblib's two workers import everything anew, twice
def test_joblib_runs_two_jobs_at_a_time_that_stop_with_the_sweep_and_go_on(start, tmp_path):
    folder = tmp_path / "sweep"
    arguments = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "save_every_n_steps=5", f"hydra.sweep.dir={folder}"]
    arguments += ["trainer.limit_train_batches=40", "dataset.batch_size=32", "trainer.max_epochs=1"]
    arguments += ["reg.lambda_k=0,0.1,-1", "-m"]
    run = start(tmp_path / "first", *arguments)
    deadline = time.monotonic() + 120
    while not all((folder / name / "last.ckpt").exists() for name in "01"):
        assert time.monotonic() < deadline, run.err.read_text()[-3000:]
        time.sleep(0.02)
    children = descendants(run.pid)
    assert not results(folder)
    os.kill(run.pid, signal.SIGTERM)
    run.finish(code=-signal.SIGTERM)
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.1)
    reached = [torch.load(folder / name / "last.ckpt", weights_only=True)["global_step"] for name in "01"]
    assert all(5 <= step < 40 for step in reached)
    assert not (folder / "2" / "last.ckpt").exists()
    printed = start(tmp_path / "second", *arguments).finish(code=1)
    assert "Traceback" not in printed
    assert "jobs at a time (hydra.launcher.n_jobs): 2, threads of each (OMP_NUM_THREADS): 1" in printed
    assert printed.strip().splitlines()[-1] == "failed: 2 reg.lambda_k=-1: reg.lambda_k=-1: must be a number, 0 or more"
    for name in "01":
        assert torch.load(folder / name / "last.ckpt", weights_only=True)["global_step"] == 40
        assert [int(row["step"]) for row in rows(folder / name) if "train/loss" in row] == list(range(40))
    assert [table(folder)[name]["status"] for name in "012"] == ["finished", "finished", "failed"]


def descendants(pid):
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


@pytest.mark.slow  # three Python processes that import everything
def test_submitit_runs_jobs_in_processes_of_their_own(start, tmp_path):
    folder = tmp_path / "sweep"
    arguments = ["hydra/launcher=submitit_local", f"hydra.sweep.dir={folder}", "trainer.max_epochs=1"]
    printed = start(tmp_path / "first", *arguments, "reg.lambda_k=0,-1", "-m").finish(code=1)
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1] == "failed: 1 reg.lambda_k=-1: reg.lambda_k=-1: must be a number, 0 or more"
    assert list(results(folder)) == ["0"]
    assert list((folder / ".submitit").glob("*/*_log.out"))


def guided(folder, *overrides):
    return ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", f"hydra.sweep.dir={folder}", *overrides]


def test_a_guided_sweep_goes_on_after_a_failure_and_started_again_asks_for_the_same_jobs(tmp_path, capsys, monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        break_where(patch, lambda module: asked.append(module.lambda_k) or len(set(asked)) == 2)
        printed = failing(capsys, *guided(tmp_path, "reg.lambda_k=interval(0.0,1.0)"))
    assert "KeyError: 'broken'" in printed.err.strip().splitlines()[-1]
    first = results(tmp_path)
    assert first.keys() == {"0", "2"}
    best = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_value == min(found["val/bits_per_dim"] for found in first.values())
    places = {name: row["reg.lambda_k"] for name, row in table(tmp_path).items()}
    assert len(set(places.values())) == 3
    call("train", "-m", *TINY, *guided(tmp_path, "reg.lambda_k=interval(0.0,1.0)"))
    assert capsys.readouterr().out.count("is finished, and skipped") == 2
    assert places == {name: row["reg.lambda_k"] for name, row in table(tmp_path).items()}
    assert results(tmp_path).keys() == {"0", "1", "2"}


@pytest.mark.slow  # a sweep of its own for one choice more
def test_a_guided_sweep_minimizes_bits_and_nfe_together(tmp_path):
    call("train", "-m", *TINY, *guided(tmp_path, "objective=bits_per_dim_and_nfe", "solver=dopri5,rk4"))
    found = {(one["val/bits_per_dim"], one["val/nfe_forward"]) for one in results(tmp_path).values()}
    front = OmegaConf.load(tmp_path / "optimization_results.yaml").solutions
    assert len(front) >= 1
    assert {tuple(solution["values"]) for solution in front} <= found
    assert min(bits for bits, _ in found) == min(solution["values"][0] for solution in front)


def test_a_guided_sweep_of_which_every_job_fails_ends_with_one_line(tmp_path, capsys):
    printed = failing(capsys, *guided(tmp_path, "reg.lambda_k=-1,-2"))
    assert printed.err.strip().splitlines()[-1] == "error: no job of the sweep is finished; what each has met stands above"
    assert printed.err.count("must be a number, 0 or more") == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=nfe"], "objective=nfe: must be bits_per_dim or bits_per_dim_and_nfe"),
        (["-m", "objective=nfe"], "objective=nfe: must be bits_per_dim or bits_per_dim_and_nfe"),
        (
            ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize"],
            "hydra.sweeper.direction=maximize: must be",
        ),
        (["-m", "hydra/sweeper=optuna", "hydra.sweeper.max_failure_rate=0.5"], "max_failure_rate=0.5: must be left out"),
        (["-m", "hydra/launcher=joblob"], "there is no hydra/launcher/joblob; pip install -e '.[sweep]' brings more"),
    ],
)
def test_mistakes_get_one_line_before_any_job(tmp_path, capsys, overrides, words):
    with pytest.raises(SystemExit) as stop:
        call("train", *overrides, f"hydra.sweep.dir={tmp_path / 'sweep'}", f"hydra.run.dir={tmp_path / 'run'}")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert stop.value.code == 2
    assert not list(tmp_path.rglob("config.yaml")) or overrides[0] != "-m"


def test_a_sweeps_jobs_do_not_start_processes_that_would_start_the_sweep(tmp_path, capsys):
    several = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "reg.lambda_k=0,0.1"]
    printed = failing(capsys, *several, f"hydra.sweep.dir={tmp_path}")
    assert printed.err.count("error: job 0: trainer.devices=2: must be 1 in a sweep") == 1
    assert not list(tmp_path.glob("*/*.ckpt"))


def make_job(folder, overrides, bits=None, nfe=None, seconds=None, **texts):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    if bits is not None:
        result = {"val/bits_per_dim": bits, "val/nfe_forward": nfe, "train/seconds": seconds}
        (folder / "result.json").write_text(json.dumps(result))


def panels(monkeypatch, folder):
    """The axes of sweep.png as it was drawn."""
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    assert sweep.draw(sweep.read_jobs(folder), folder / "sweep.png")
    (figure,) = figures
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def test_the_map_has_every_job_in_its_place(tmp_path, monkeypatch):
    """Two λ_K times three λ_J, two seeds each: means over the seeds; one job of twelve diverged, both of one cell failed."""
    number = 0
    for k in (0.1, 0):
        for j in (0, 10, 2):
            for seed in (0, 1):
                overrides = [f"reg.lambda_k={k}", f"reg.lambda_j={j}", f"seed={seed}", "model.hidden=4"]
                numbers = (10 * k + j + seed, 100 * k, 5 + seed)
                if (k, j) == (0, 10):
                    make_job(tmp_path / str(number), overrides, failed="error")
                elif (k, j, seed) == (0.1, 2, 1):
                    make_job(tmp_path / str(number), overrides, diverged="z became NaN")
                else:
                    make_job(tmp_path / str(number), overrides, *numbers)
                number += 1
    jobs = sweep.read_jobs(tmp_path)
    assert [job.name for job in jobs] == [str(i) for i in range(12)]
    assert [job.status for job in jobs].count("failed") == 2
    assert (jobs[5].status, jobs[5].line) == ("diverged", "z became NaN")
    assert jobs[11].swept == {"reg.lambda_k": "0", "reg.lambda_j": "2", "seed": "1"}
    axes = panels(monkeypatch, tmp_path)
    bits, nfe, seconds = (ax.images[0].get_array().filled(-1).tolist() for ax in axes)
    assert bits == [[0.5, 2.5, -1], [1.5, 3, 11.5]]
    assert nfe == [[0, 0, -1], [10, 10, 10]]
    assert seconds == [[5.5, 5.5, -1], [5.5, 5, 5.5]]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0", "2", "10"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["0", "0.1"]
    assert {text.get_text() for text in axes[0].texts} == {"0.5000", "2.5000", "×", "1.5000", "3.0000", "11.5000"}
    assert axes[0].get_xlabel() == "λ_J"


def test_one_lambda_makes_curves_another_choice_a_row_of_them_and_none_no_picture(tmp_path, monkeypatch):
    for number, (k, solver) in enumerate([(1, "rk4"), (0, "rk4"), (0, "dopri5"), (1, "dopri5")]):
        make_job(tmp_path / "one" / str(number), [f"reg.lambda_k={k}", f"solver={solver}"], 3 + number, 24, 1)
        make_job(tmp_path / "none" / str(number), [f"solver={solver}", f"seed={k}"], 3 + number, 24, 1)
    axes = panels(monkeypatch, tmp_path / "one")
    assert len(axes) == 6
    assert axes[0].lines[0].get_xydata().tolist() == [[0, 4], [1, 3]]
    assert axes[3].lines[0].get_xydata().tolist() == [[0, 5], [1, 6]]
    assert axes[3].get_title() == "val bits/dim – solver=dopri5"
    assert not sweep.draw(sweep.read_jobs(tmp_path / "none"), tmp_path / "sweep.png")
    assert not (tmp_path / "sweep.png").exists()


def test_lambdas_drawn_at_random_are_points_of_a_plane(tmp_path, monkeypatch):
    for number in range(6):
        make_job(tmp_path / str(number), [f"reg.lambda_k=0.{number}", f"reg.lambda_j=0.{number + 1}"], number, 24, 1)
    points = panels(monkeypatch, tmp_path)[0].collections[0]
    assert points.get_array().tolist() == list(range(6))
    assert points.get_offsets()[2].tolist() == pytest.approx([0.3, 0.2])
