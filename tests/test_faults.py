"""Runs that are interrupted, killed or broken, as real processes: what they leave, and that they go on from there."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.hidden=4",
    "model.pieces=1",
    "dataset.batch_size=16",
    "dataset.eval_batch_size=20",
    "trainer.limit_train_batches=30",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "warmup_steps=5",
    "pictures.samples=4",
    "wandb.mode=disabled",
]


def start(folder, *overrides):
    command = [sys.executable, ROOT / "src" / "train.py", *SMALL, f"hydra.run.dir={folder}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the same sums in the same order, however many cores are free
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process, code=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err[-3000:]
    return out, err


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def wait_for_step(process, folder, step):
    """Until metrics.csv has a row of this training step."""
    for _ in range(2000):
        if (folder / "metrics.csv").exists() and any(int(row.get("step") or 0) >= step for row in rows(folder)):
            return
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.02)
    raise AssertionError("the run did not come so far")


def same(a, b, path=""):
    """Whether two values out of checkpoints are equal, to the bit; timings and folders do not count."""
    if isinstance(a, dict):
        ignored = {
            "config",
            "dirpath",
            "best_model_path",
            "last_model_path",
            "kth_best_model_path",
            "best_k_models",
            "seconds",
        }
        assert {str(key) for key in a} == {str(key) for key in b}, path
        for key in a.keys() - ignored:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def curves(folder):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows(folder)]


def assert_same_run(folder, whole):
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (folder, whole)]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks", "loops")
    same(*({key: end[key] for key in keys} for end in ends))
    bests = [torch.load(f / "best.ckpt", weights_only=True)["state_dict"] for f in (folder, whole)]
    same(*bests)
    assert curves(folder) == curves(whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder))
    return folder


@pytest.mark.parametrize(("step", "number"), [(40, signal.SIGTERM), (3, signal.SIGINT), (65, signal.SIGUSR1)])
def test_a_signal_stops_a_run_and_it_goes_on_to_the_same_end(tmp_path, whole, step, number):
    process = start(tmp_path)
    wait_for_step(process, tmp_path, step)
    process.send_signal(number)
    _, err = finish(process, code=128 + number)
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"stopped: by {number.name} after ")
    assert f"{tmp_path / 'last.ckpt'}; to go on: python src/train.py model.hidden=4" in line
    assert "Traceback" not in err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] > step
    finish(start(tmp_path, "ckpt_path=auto"))
    assert_same_run(tmp_path, whole)


def test_a_run_goes_on_from_the_end_of_an_epoch_to_the_same_end(tmp_path, whole):
    finish(start(tmp_path, "trainer.max_epochs=2"))
    finish(start(tmp_path, "ckpt_path=auto"))
    assert_same_run(tmp_path, whole)
