"""Runs at their edges: limits, options of the Trainer, other epochs on resuming, lost files."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning_utilities.core.imports import RequirementCache

from helpers import call, column, refused
from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE

pytestmark = pytest.mark.usefixtures("blank_figures")

TOY = [  # epochs of 12 batches
    *("dataset=toy", "dataset.train=192", "dataset.validation=50", "dataset.test=50"),
    *("dataset.batch_size=16", "model.hidden=4", "warmup_steps=0", "trainer.max_epochs=2"),
    *("trainer.log_every_n_steps=1", "logger=csv", "trainer.accelerator=cpu"),
    "callbacks.refine_grid=null",
]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """half(step) returns the folder of a run of four epochs that max_steps ended at a step."""
    folders = {}

    def run(step):
        if step not in folders:
            folders[step] = tmp_path_factory.mktemp("half") / "run"
            limits = ["trainer.max_epochs=4", f"trainer.max_steps={step}"]
            call("train", *TOY, *limits, f"hydra.run.dir={folders[step]}")
        return folders[step]

    return run


OTHER_EPOCHS = {
    "two devices": ["trainer.limit_train_batches=6"],  # each has half of the batches
    "accumulation": ["trainer.accumulate_grad_batches=3"],
    "larger batch": ["dataset.batch_size=48"],
    "fewer rows": ["dataset.train=100"],
}


@pytest.mark.parametrize(
    ("name", "step"), [*((name, 24) for name in OTHER_EPOCHS), ("fewer rows", 33)]
)
def test_the_rate_falls_with_the_share_of_the_epochs(half, tmp_path, name, step):
    """A half cosine over four epochs, of which two, or two and three quarters, have passed.

    An epoch that was cut short and has other batches now may begin again.
    """
    folder = shutil.copytree(half(step), tmp_path / "run")
    more = [*OTHER_EPOCHS[name], "trainer.max_epochs=4", "ckpt_path=auto"]
    call("train", *TOY, *more, f"hydra.run.dir={folder}")
    full, rates = column(folder, "train/lr")[0], column(folder, "train/lr")[step:]
    steps = {"accumulation": 4, "larger batch": 4, "two devices": 6, "fewer rows": 7}[name]
    assert 4 * steps - len(rates) in ([2 * steps] if step == 24 else range(2 * steps, 3 * steps))
    shares = [1 - (len(rates) - k) / (4 * steps) for k in range(len(rates))]
    expected = [full * (1 + torch.tensor(torch.pi * share).cos().item()) / 2 for share in shares]
    assert rates == pytest.approx(expected, rel=0.01)
    assert load_checkpoint(folder / "last.ckpt")["epoch"] == 3


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: Input should be 'auto', 'ddp'"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches=0: Input should be"),
        ("+trainer.barebones=true", "trainer: `Trainer(barebones=True, enable_checkpointing="),
        ("+trainer.logger=false", "trainer.logger: is set by this program; +callbacks.NAME"),
        ("+trainer.foo=1", "trainer: Trainer.__init__() got an unexpected keyword argument 'foo'"),
        ("trainer.max_epochs=-3", "trainer: `max_epochs` must be a non-negative integer or -1"),
    ],
)
def test_an_option_that_cannot_work_is_one_line_before_the_run(tmp_path, capsys, option, words):
    assert words in refused(capsys, "train", *TOY, option, f"hydra.run.dir={tmp_path / 'run'}")
    assert not list(tmp_path.rglob("*.log"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_logger_that_is_not_installed_is_named_before_the_data(tmp_path, capsys, monkeypatch):
    absent = RequirementCache("mlflow-is-absent")
    monkeypatch.setattr("pytorch_lightning.loggers.mlflow._MLFLOW_AVAILABLE", absent)
    data = ["dataset=table", "dataset.path=missing.csv", "logger=mlflow"]
    assert "mlflow-is-absent" in refused(capsys, "train", *data, f"hydra.run.dir={tmp_path}")


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.max_steps=3"],
        ["trainer.limit_val_batches=0"],
        ["trainer.max_epochs=0"],
        ["trainer.max_time=00:00:00"],
        ["+trainer.check_val_every_n_epoch=9"],
        ["trainer.limit_test_batches=0", "trainer.max_epochs=1"],
        ["+trainer.val_check_interval=50", "+trainer.check_val_every_n_epoch=null"],
        ["trainer.limit_test_batches=0", "trainer.limit_val_batches=0"],
    ],
)
def test_a_finished_run_has_what_later_commands_need(tmp_path, capsys, options):
    place = f"hydra.run.dir={tmp_path / 'run'}"
    call("train", *TOY, *options, place)
    said = capsys.readouterr()
    assert "error" not in said.err
    validated = options[-1] in ("trainer.max_steps=3", "trainer.max_epochs=1")
    assert ("best.ckpt has the last weights" in said.out) == (not validated)
    assert ("validation set" in said.out) == ("trainer.limit_test_batches=0" in options)
    assert (", the best so far" in said.out) == validated
    for command in ("evaluate", "sample"):
        call(command, str(tmp_path / "run"), f"hydra.run.dir={tmp_path / command}")
    call("train", *TOY, "ckpt_path=auto", "trainer.max_epochs=3", place)
    assert load_checkpoint(tmp_path / "run" / "best.ckpt")["global_step"] in (12, 24, 36)


def test_a_folder_without_best_ckpt_gives_its_last_and_says_so(half, tmp_path, capsys):
    folder = shutil.copytree(half(24), tmp_path / "run")
    (folder / "best.ckpt").unlink()
    for command in ("evaluate", "sample"):
        call(command, str(folder), f"hydra.run.dir={tmp_path / command}")
        assert "run has no best.ckpt: last.ckpt is used" in capsys.readouterr().err
    (folder / "last.ckpt").unlink()
    assert "best.ckpt: there is no such checkpoint" in refused(capsys, "evaluate", str(folder))


@pytest.mark.parametrize(
    "options",  # what is written next: metrics.csv, last.ckpt or best.ckpt
    [
        [],
        ["callbacks.save.every_n_steps=1", "trainer.log_every_n_steps=9"],
        ["trainer.log_every_n_steps=0"],
    ],
)
def test_a_folder_that_is_removed_does_not_come_back(tmp_path, capsys, monkeypatch, options):
    folder, step = tmp_path / "run", RNODE.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            shutil.rmtree(folder)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", training_step)
    line = refused(capsys, "train", *TOY, *options, f"hydra.run.dir={folder}", code=1)
    assert f"{folder}/" in line
    assert "No such file" in line or "does not exist" in line
    assert not folder.exists()


def test_validations_are_at_most_a_line_a_second(tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def monotonic():
        clock.now += 0.1  # a few calls an epoch
        return clock.now

    monkeypatch.setattr("rnode.training.progress.time", SimpleNamespace(monotonic=monotonic))
    short = ["trainer.max_epochs=12", "trainer.limit_train_batches=1", "callbacks.interval=null"]
    call("train", *TOY, *short, f"hydra.run.dir={tmp_path}")
    during, _, table = capsys.readouterr().out.partition("test set")
    lines = [line for line in during.splitlines() if ": validation " in line]
    assert 1 < len(lines) < 6
    assert lines[-1].startswith("epoch 12 of 12, ")  # the last is never left out
    assert " nats (" in lines[-1]  # of a table, in its units
    names = [line.split()[1] for line in table.splitlines() if line.startswith("│")]
    assert names[:2] == ["test/nats", "val/bits_per_dim"]
