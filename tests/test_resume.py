"""A run that ends early and resumes has the batches, weights, best checkpoint and curves of one
that nothing disturbed."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import timer

from helpers import RATE, assert_same_run, call, column, curves, refused
from rnode.training.checkpoint import AtomicCheckpointIO, load_checkpoint
from rnode.training.module import RNODE
from rnode.training.resume import SaveAndStop

pytestmark = pytest.mark.usefixtures("blank_figures")

SHORT = [  # two epochs of six batches
    *RATE,
    *("model.hidden=4", "model.pieces=1", "solver.train.steps=1", "callbacks.refine_grid=null"),
    *("trainer.limit_train_batches=6", "trainer.limit_val_batches=1", "trainer.max_epochs=2"),
    *("trainer.limit_test_batches=1", "dataset.batch_size=4", "dataset.eval_batch_size=4"),
    *("trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false"),
    *("callbacks.figures.every_n_epochs=9", "logger.wandb.mode=disabled"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(*overrides) returns the folder of a whole run; equal runs are made once."""
    folders = {}

    def run(*overrides):
        if overrides not in folders:
            folders[overrides] = tmp_path_factory.mktemp("whole") / "run"
            call("train", *SHORT, *overrides, f"hydra.run.dir={folders[overrides]}")
        return folders[overrides]

    return run


def stopped(code, *overrides):
    with pytest.raises(SystemExit) as stop:
        call("train", *overrides)
    assert stop.value.code == code


def at_batch(monkeypatch, number, function):
    """Call `function` before the training batch of this number, counted from 0 over all epochs."""
    count, step = [], RNODE.training_step

    def training_step(self, batch, batch_idx):
        count.append(batch_idx)
        if len(count) == number + 1:
            function()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, "training_step", training_step)


ACCUMULATE = "trainer.accumulate_grad_batches=4"  # steps after batches 4 and 6 of an epoch
OFTEN = "+trainer.val_check_interval=2"
DECAY = ("warmup_steps=2", "decay=true")
MATCHING = (
    "model=mlp",
    "pretrain=flow_matching",
    "callbacks.pretraining.share=0.3",
    "decay=true",
)  # 4 steps


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow(reason="another case like the others"))


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ((), (9,)),  # in the second epoch
        slow((), (4, 9)),
        slow((ACCUMULATE,), (1, 3)),
        slow((), (1,)),
        slow((), (6,)),  # at the end of an epoch
        slow((OFTEN,), (3, 8)),
        slow((OFTEN,), (4,)),  # right after a validation
        slow(DECAY, (4, 8)),
    ],
)
def test_max_steps(undisturbed, tmp_path, options, limits):
    whole, folder = undisturbed(*options), f"hydra.run.dir={tmp_path}"
    for limit in limits:
        call("train", *SHORT, *options, folder, "ckpt_path=auto", f"trainer.max_steps={limit}")
        assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == limit
    call("train", *SHORT, *options, folder, "ckpt_path=auto")
    assert_same_run(tmp_path, whole)


def test_max_time(undisturbed, tmp_path, monkeypatch):
    folder, clock = f"hydra.run.dir={tmp_path}", SimpleNamespace(now=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: clock.now))
        at_batch(patch, 4, lambda: setattr(clock, "now", 3600.0))
        call("train", *SHORT, folder, "trainer.max_time=01:00:00")
    for file in ("last.ckpt", "best.ckpt"):  # the last weights are validated, out of turn
        assert load_checkpoint(tmp_path / file)["global_step"] == 5
    call("train", *SHORT, folder, "trainer.max_time=02:00:00", "ckpt_path=auto")
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path, undisturbed())]
    for weight, expected in zip(*(end["state_dict"].values() for end in ends), strict=True):
        assert torch.equal(weight, expected)
    assert ends[0]["loops"] == ends[1]["loops"]
    *_, validation = (row for row in curves(tmp_path) if row["step"] == "4")
    assert "val/bits_per_dim" in validation
    assert [row for row in curves(tmp_path) if row != validation] == curves(undisturbed())


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ((), 5),
        slow((ACCUMULATE,), 9),
        slow(DECAY, 3),
        (MATCHING, 2),
        slow(MATCHING, 8),
        *(slow((), batch) for batch in (3, 6, 11)),
        *(slow((ACCUMULATE,), batch) for batch in (3, 5)),
        *(slow((OFTEN,), batch) for batch in (3, 5, 9)),
        *(slow(DECAY, batch) for batch in (6, 9)),
    ],
)
def test_a_signal_during_any_batch(undisturbed, tmp_path, monkeypatch, options, batch):
    whole, run = undisturbed(*options), [*SHORT, *options, f"hydra.run.dir={tmp_path}"]
    with monkeypatch.context() as patch:
        at_batch(patch, batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped(128 + signal.SIGTERM, *run)
    call("train", *run, "ckpt_path=auto")
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("batch", [7, slow(5)])
def test_a_crash_between_two_checkpoints(undisturbed, tmp_path, monkeypatch, batch):
    whole, run = (
        undisturbed(),
        [*SHORT, f"hydra.run.dir={tmp_path}", "callbacks.save.every_n_steps=2"],
    )

    def crash():
        raise RuntimeError("a crash")

    with monkeypatch.context() as patch:
        at_batch(patch, batch, crash)
        stopped(1, *run)
    call("train", *run, "ckpt_path=auto")
    assert_same_run(tmp_path, whole)


@pytest.mark.slow(reason="three runs")
def test_a_signal_during_validation_and_during_the_test(undisturbed, tmp_path, monkeypatch):
    run = [*SHORT, f"hydra.run.dir={tmp_path}"]
    for step in ("validation_step", "test_step"):
        with monkeypatch.context() as patch:
            healthy = getattr(RNODE, step)

            def signalled(self, *arguments, healthy=healthy):
                os.kill(os.getpid(), signal.SIGINT)
                return healthy(self, *arguments)

            patch.setattr(RNODE, step, signalled)
            stopped(128 + signal.SIGINT, *run, "ckpt_path=auto")
    call("train", *run, "ckpt_path=auto")
    assert_same_run(tmp_path, undisturbed())


def test_a_folder_that_was_moved(undisturbed, tmp_path):
    """Its best checkpoint is the one in the folder now, and only a better one replaces it."""
    old, new = tmp_path / "old", tmp_path / "new"
    call("train", *SHORT, f"hydra.run.dir={old}", "trainer.max_steps=7")
    old.rename(new)
    call("train", *SHORT, f"hydra.run.dir={new}", "ckpt_path=auto")
    assert_same_run(new, undisturbed())
    assert not old.exists()
    states = load_checkpoint(new / "last.ckpt")["callbacks"].values()
    (best,) = (state for state in states if "best_model_path" in state)
    assert best["best_model_path"] == str(new / "best.ckpt")
    before = (new / "best.ckpt").read_bytes()
    worse = ["trainer.max_epochs=3", "optimizer.lr=0.2"]
    call("train", *SHORT, *worse, f"hydra.run.dir={new}", "ckpt_path=auto")
    assert min(column(new, "val/bits_per_dim")) < column(new, "val/bits_per_dim")[-1]
    assert (new / "best.ckpt").read_bytes() == before


def test_a_run_with_nothing_left_tests_its_best_checkpoint(undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed(), tmp_path / "copy")
    (folder / "result.json").unlink()
    call("train", *SHORT, f"hydra.run.dir={folder}", "ckpt_path=auto")
    assert_same_run(folder, undisturbed())
    assert (folder / "result.json").read_text() == (undisturbed() / "result.json").read_text()


def test_a_run_in_another_folder_keeps_its_own_best_checkpoint(undisturbed, tmp_path):
    path = undisturbed() / "last.ckpt"
    before = (undisturbed() / "best.ckpt").read_bytes()
    more = ["trainer.max_epochs=3", "optimizer.lr=0.05", f"ckpt_path={path}"]
    call("train", *SHORT, *more, f"hydra.run.dir={tmp_path}")
    assert (tmp_path / "best.ckpt").exists()
    assert (undisturbed() / "best.ckpt").read_bytes() == before


def test_another_class_of_optimizer_is_refused(undisturbed, tmp_path, capsys):
    other = ["optimizer._target_=torch.optim.SGD", f"ckpt_path={undisturbed() / 'last.ckpt'}"]
    line, code = refused(capsys, "train", *SHORT, *other, f"hydra.run.dir={tmp_path}")
    assert "optimizer._target_ is torch.optim.Adam there and torch.optim.SGD here" in line
    assert code == 2


@pytest.mark.slow(reason="the learning rate has a quick test for a schedule that was there")
def test_a_schedule_that_was_not_there_before_continues_at_the_true_step(undisturbed, tmp_path):
    path = undisturbed() / "last.ckpt"
    more = ["trainer.max_epochs=3", *DECAY, f"ckpt_path={path}", f"hydra.run.dir={tmp_path}"]
    call("train", *SHORT, *more)
    (group,) = load_checkpoint(tmp_path / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0, abs=1e-12)  # half a cosine over 18 steps has ended


def test_the_checkpoint_counts_only_batches_of_completed_steps(tmp_path, monkeypatch):
    counted = []
    save = SaveAndStop.save

    def note(self, trainer):
        save(self, trainer)
        counted.append((self.step, self.used))

    monkeypatch.setattr(SaveAndStop, "save", note)
    every = [ACCUMULATE, "callbacks.save.every_n_steps=1", f"hydra.run.dir={tmp_path}"]
    call("train", *SHORT, *every)
    assert {(1, 4), (2, 6), (3, 4), (4, 6)} <= set(counted)
    assert not {used for _, used in counted} - {0, 4, 6}


def test_a_run_resumes_from_its_best_checkpoint(undisturbed, tmp_path):
    """From the end of the first epoch, whose weights are the best of a run of one epoch."""
    first, second = tmp_path / "first", tmp_path / "second"
    call("train", *SHORT, "trainer.max_epochs=1", f"hydra.run.dir={first}")
    call("train", *SHORT, f"ckpt_path={first / 'best.ckpt'}", f"hydra.run.dir={second}")
    ends = [load_checkpoint(f / "last.ckpt") for f in (second, undisturbed())]
    for weight, expected in zip(*(end["state_dict"].values() for end in ends), strict=True):
        assert torch.equal(weight, expected)
    assert [end["global_step"] for end in ends] == [12, 12]
    assert column(second, "train/loss") == column(undisturbed(), "train/loss")[6:]


def test_best_is_written_before_last(tmp_path, monkeypatch):
    """A run that dies between the two resumes from before the validation, and makes it again."""
    written = []
    save = AtomicCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        written.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", note)
    call("train", *SHORT, f"hydra.run.dir={tmp_path}")
    assert written == 2 * ["best.ckpt", "last.ckpt"]
