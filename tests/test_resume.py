"""A run that ends early and resumes has the batches, weights, best checkpoint and curves of one
that nothing disturbed."""

import functools
import shutil
import signal
from types import SimpleNamespace

import pytest
from pytorch_lightning.callbacks import timer

from helpers import EPOCHS, assert_same_run, call, column, curves, same
from rnode.training.checkpoint import load_checkpoint
from rnode.training.module import RNODE

pytestmark = pytest.mark.usefixtures("blank_figures")

SHORT = [  # two epochs of six batches
    *(*EPOCHS, "trainer.max_epochs=2", "trainer.limit_train_batches=6", "model.pieces=1"),
    *("solver.train.steps=1", "callbacks.refine_grid.tolerance=9", "callbacks.interval=null"),
    "callbacks.figures.every_n_epochs=9",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(*overrides) returns the folder of a whole run; equal runs are made once."""

    @functools.cache
    def run(*overrides):
        folder = tmp_path_factory.mktemp("whole")
        call("train", *SHORT, *overrides, f"hydra.run.dir={folder}")
        return folder

    return run


def stopped(code, *overrides):
    with pytest.raises(SystemExit) as stop:
        call("train", *overrides)
    assert stop.value.code == code


def at_batch(monkeypatch, number, function, method="training_step"):
    """Call `function` before the batch of this number, counted from 0 over all epochs."""
    count, healthy = [], getattr(RNODE, method)

    def step(self, batch, batch_idx):
        count.append(batch_idx)
        if len(count) == number + 1:
            function()
        return healthy(self, batch, batch_idx)

    monkeypatch.setattr(RNODE, method, step)


ACCUMULATE = "trainer.accumulate_grad_batches=4"  # steps after batches 4 and 6 of an epoch
OFTEN = "+trainer.val_check_interval=2"
DECAY = ("warmup_steps=2", "decay=true")
REFINE = ("callbacks.refine_grid.tolerance=1e-9", "warmup_steps=3")  # at the first step
GAUSSIAN = ("base=gaussian", "decay=true")
SAVE = ("callbacks.save.every_n_steps=2",)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow(reason="another case like the others"))


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        (REFINE, (9,)),  # in the second epoch
        slow((), (1, 6)),  # in the first, and at its end
        slow((ACCUMULATE,), (1, 3)),
        slow((OFTEN, *DECAY), (3, 4, 8)),  # 4: right after a validation
    ],
)
def test_max_steps(undisturbed, tmp_path, options, limits):
    run = [*SHORT, *options, f"hydra.run.dir={tmp_path}", "ckpt_path=auto"]
    for limit in limits:
        call("train", *run, f"trainer.max_steps={limit}")
        assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == limit
    call("train", *run)
    assert_same_run(tmp_path, undisturbed(*options))


def test_max_time(undisturbed, tmp_path, monkeypatch):
    folder, clock = f"hydra.run.dir={tmp_path}", SimpleNamespace(now=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: clock.now))
        at_batch(patch, 4, lambda: setattr(clock, "now", 3600.0))
        call("train", *SHORT, folder, "trainer.max_time=01:00:00")
    for file in ("last.ckpt", "best.ckpt"):  # the last weights are validated, out of turn
        assert load_checkpoint(tmp_path / file)["global_step"] == 5
    call("train", *SHORT, folder, "trainer.max_time=02:00:00", "ckpt_path=auto")
    ends = [load_checkpoint(f / "last.ckpt") for f in (tmp_path, undisturbed())]
    same(*(end["state_dict"] for end in ends))
    assert ends[0]["loops"] == ends[1]["loops"]
    *_, validation = (row for row in curves(tmp_path) if row["step"] == "4")
    assert "val/bits_per_dim" in validation
    assert [row for row in curves(tmp_path) if row != validation] == curves(undisturbed())


def raise_signal(number):
    """Raise a signal in this process; 0 stands for a crash."""
    if number == 0:
        raise RuntimeError("a crash")
    signal.raise_signal(number)


@pytest.mark.parametrize(
    ("options", "number", "batch"),
    [
        ((), signal.SIGTERM, 5),
        (GAUSSIAN, signal.SIGUSR1, 2),
        (SAVE, 0, 7),
        *(slow((), signal.SIGTERM, batch) for batch in (3, 6, 11)),
        *(slow((ACCUMULATE,), signal.SIGTERM, batch) for batch in (3, 5, 9)),
        *(slow((OFTEN, *DECAY), signal.SIGTERM, batch) for batch in (3, 6, 9)),
    ],
)
def test_a_signal_or_a_crash_in_any_batch(
    undisturbed, tmp_path, monkeypatch, options, number, batch
):
    run = [*SHORT, *options, f"hydra.run.dir={tmp_path}"]
    with monkeypatch.context() as patch:
        at_batch(patch, batch, lambda: raise_signal(number))
        stopped(128 + number if number else 1, *run)
    call("train", *run, "ckpt_path=auto")
    assert_same_run(tmp_path, undisturbed(*(() if options is SAVE else options)))


@pytest.mark.slow(reason="three runs")
def test_a_signal_during_validation_and_during_the_test(undisturbed, tmp_path, monkeypatch):
    run = [*SHORT, f"hydra.run.dir={tmp_path}"]
    for method in ("validation_step", "test_step"):
        with monkeypatch.context() as patch:
            at_batch(patch, 0, lambda: raise_signal(signal.SIGINT), method)
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
    best = [state["best_model_path"] for state in states if "best_model_path" in state]
    assert best == [str(new / "best.ckpt")]
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
