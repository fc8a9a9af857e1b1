"""Whole training runs, most of them in this process to save the imports."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pytorch_lightning.callbacks import Timer

from helpers import TRAIN, TWO_STEPS, call, column, make_flow, succeed
from rnode.app import train
from rnode.app.schema import CONF
from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE
from rnode.training.results import RESULTS
from rnode.training.schedule import decay_passed, passed

LOADED = """
import sys
from pytorch_lightning import Callback

class Seen(Callback):
    def on_train_start(self, *_):
        open("loaded.txt", "w").write(" ".join(sys.modules))
"""
pytestmark = pytest.mark.usefixtures("blank_figures")


def test_the_default_run_as_a_user_starts_it(tmp_path):
    """A process, two epochs of the digits, and the files and the table that README promises."""
    sizes = ["model.hidden=8", "model.pieces=1", "dataset.batch_size=64", "trainer.max_epochs=2"]
    Path("modules.py").write_text(LOADED)
    seen = "+callbacks.seen._target_=modules.Seen"
    printed = succeed(*TRAIN, *sizes, seen, "trainer.log_every_n_steps=1", "hydra.run.dir=run")
    folder = tmp_path / "run"
    loaded = set(Path("loaded.txt").read_text().split())  # before the first step
    assert {"torch", "rnode.training.module"} <= loaded
    assert not loaded & {"wandb", "polars", "jinja2", "rnode.app.report", "tensorboard"}
    written = "config.yaml metrics.csv result.json report.html environment.yaml best.ckpt last.ckpt"
    for name in (*written.split(), "samples.png", ".hydra/overrides.yaml"):
        assert (folder / name).stat().st_size > 0, name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["callbacks"]["save"]["folder"] == str(folder)  # resolved
    untrained = column(folder, "train/bits_per_dim")[0]
    assert untrained > 6
    assert column(folder, "val/bits_per_dim")[-1] < untrained - 3
    assert 1.5 < column(folder, "test/bits_per_dim")[0] < untrained - 3
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == set(RESULTS)
    for name, number in result.items():
        assert re.search(rf"{name} .* {number:.5g} ", printed), name
    nats = 64 * math.log(2) * result["test/bits_per_dim"]
    assert re.search(rf"test/nats .* {nats:.5g} ", printed)
    assert re.search(r"a step .*takes 24 NFE and .* s, an epoch .*, .* to go", printed)
    assert re.search(r"epoch 2.*, step 40: validation \d.* bits/dim, the best so far", printed)
    assert list(folder.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert load_checkpoint(folder / "last.ckpt")["config"] == config


@pytest.mark.parametrize(
    ("experiment", "reg", "method", "first_step"),
    [
        ("mnist", (0.01, 0.01), "rk4", 0.3),
        ("cifar10", (0.01, 0.03), "rk4", 0.3),
        ("mnist_ffjord", (0, 0), "dopri5", 0.01),
        ("cifar10_ffjord", (0, 0), "dopri5", 0.01),
    ],
)
def test_the_papers_runs_have_its_settings(experiment, reg, method, first_step):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}"])
    solver = instantiate(cfg.solver)
    train, test = solver.train, solver.test
    assert (cfg.reg.lambda_k, cfg.reg.lambda_j) == reg
    assert (train.method, train.integrals, solver.gradient) == (method, "system", "adjoint")
    assert (train.steps, train.first_step) == (4, first_step)  # step size 0.25
    assert (test.method, test.integrals) == ("dopri5", "system")
    assert (train.rtol, train.atol, test.rtol, test.atol) == (1e-5,) * 4
    assert (cfg.dataset.batch_size, cfg.trainer.max_epochs, cfg.optimizer.lr) == (200, 100, 1e-3)
    assert cfg.trainer.gradient_clip_val is None
    assert (cfg.decay, cfg.warmup_steps) == (False, 0)
    assert (cfg.model.hidden, cfg.model.layers, cfg.model.pieces) == (64, 4, 2)


def test_a_multirun_has_a_folder_and_a_wandb_run_for_each_job(tmp_path, monkeypatch):
    ended = []
    finish_wandb = train.finish_wandb

    def finish():
        run = wandb.run
        ended.append((run.name, run.group, {*run.tags}, dict(run.summary)))
        finish_wandb()

    monkeypatch.setattr(train, "finish_wandb", finish)
    overrides = [override for override in TWO_STEPS if "logger" not in override]
    call("train", "-m", "reg.lambda_k=0,0.1", *overrides, f"hydra.sweep.dir={tmp_path}")
    assert len({path.name for path in tmp_path.glob("*/wandb/offline-run-*/*.wandb")}) == 2
    for folder, lambda_k in ((tmp_path / "0", 0), (tmp_path / "1", 0.1)):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["reg"]["lambda_k"] == lambda_k
        assert len(column(folder, "train/loss")) == 2
        name, group, tags, summary = ended.pop(0)
        assert (name, group) == (f"reg.lambda_k={lambda_k}", tmp_path.name)
        assert tags == {"dataset=digits", "model=small", "solver=auto"}
        assert dict(summary["val/bits_per_dim"]) == {"min": min(column(folder, "val/bits_per_dim"))}
        scalars = ("lr", "gradient_norm", "nfe_total", "seconds_total")
        assert {"samples", *(f"train/{name}" for name in scalars)} <= summary.keys()


@pytest.mark.slow(reason="TensorBoard takes seconds to import")
def test_tensorboard_has_the_figures_of_metrics_csv(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(*TWO_STEPS, "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("train/bits_per_dim", "train/nfe_forward", "val/bits_per_dim"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx(column(folder, name), rel=1e-6)
    assert not (folder / "wandb").exists()


def test_validation_takes_nothing_from_trainings_random_stream(run):
    often = run(*TWO_STEPS, "trainer.max_steps=3", "+trainer.val_check_interval=1", folder="often")
    never = run(*TWO_STEPS, "trainer.max_steps=3", folder="never")
    assert column(often, "train/loss") == column(never, "train/loss")


def test_the_rate_rises_linearly_and_falls_as_half_a_cosine_to_the_first_limit(monkeypatch):
    half = Timer("00:00:00:10")
    monkeypatch.setattr(half, "time_elapsed", lambda *_: 5.0)
    trainer = SimpleNamespace(max_steps=8, max_epochs=-1)
    trainer.strategy = SimpleNamespace(broadcast=lambda share: share)
    options = {"lambda_k": 0.0, "lambda_j": 0.0, "warmup_steps": 3}
    for decay, timers in ((False, []), (True, []), (True, [half])):
        trainer.callbacks = timers
        module = RNODE(make_flow((2,)), torch.optim.Adam, **options, decay=decay)
        rise = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]
        shares = [max(step / 8, 0.5 * bool(timers)) for step in range(8)]
        fall = [(1 + math.cos(math.pi * share)) / 2 if decay else 1 for share in shares]
        expected = [a * b for a, b in zip(rise, fall, strict=True)]
        found = []
        for trainer.global_step in range(8):
            share = decay_passed(trainer) if decay else 0.0
            assert passed(trainer) == shares[trainer.global_step]
            found.append(module.schedule(trainer.global_step, share))
        assert found == pytest.approx(expected)
