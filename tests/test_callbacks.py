"""Callbacks and loggers of a run, each alone."""

from unittest.mock import Mock

import pytest
import torch
from matplotlib.figure import Figure

from helpers import EPOCHS, column
from rnode.training import callbacks
from rnode.training.callbacks import StopBehindClosedForm
from rnode.training.checkpoint import FORMAT, load_checkpoint
from rnode.training.loggers import MetricsCSV


def test_a_run_stops_early_after_so_many_validations_without_a_better_one(run):
    options = ["trainer.max_epochs=30", "optimizer.lr=0.1", "callbacks.figures=null"]
    folder = run(*EPOCHS, *options, "callbacks.early_stopping.patience=2")
    values = column(folder, "val/bits_per_dim")
    best, last = (load_checkpoint(folder / f"{name}.ckpt")["epoch"] for name in ("best", "last"))
    assert values.index(min(values)) == best == last - 2 == len(values) - 3 < 27


def test_a_resumed_run_keeps_the_rows_that_it_does_not_log_again(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    assert not path.exists()
    for step, row in enumerate(({"b": 1.0}, {"b": 2.0}, {"a": 3.0})):
        logger.log_metrics(row, step)
    assert path.read_text().splitlines() == ["a,b,step", ",1.0,0", ",2.0,1", "3.0,,2"]
    logger.log_metrics({"test/b": 4.0}, 1)
    for step, kept in ((2, ["1.0,0", "2.0,1"]), (1, ["1.0,0"])):
        MetricsCSV(path, {"global_step": step})
        assert path.read_text().splitlines() == ["b,step", *kept]
    MetricsCSV(path)
    assert not path.exists()


def test_figures_are_drawn_every_few_epochs_and_of_the_tested_weights(run, monkeypatch):
    titles = []
    monkeypatch.setattr(callbacks, "plot_grids", lambda panels: titles.extend(panels) or Figure())
    run(*EPOCHS, "trainer.max_epochs=5", "callbacks.figures.every_n_epochs=2")
    steps = [title.partition(", ")[0] for title in titles[1::2]]
    assert steps == [f"samples (step {step}" for step in (4, 8, 10)]  # an epoch has two steps


@pytest.mark.parametrize(
    ("bits", "steps"),
    [
        ([9.0, 9.0, 7.0, 6.9, 7.0, 5.9, 5.1, 5.1], 6),  # 0.9 behind, 1.1 gained since half
        ([9.0, 9.0, 7.0, 6.9, 9.0, 5.6, 5.5, 5.4], 8),  # 0.6 behind, 1.4 gained
        ([9.0, 4.9, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0], 8),  # it was ahead
        ([None, None, None, 6.0, 6.0, 6.0, 6.0, 6.0], 8),  # its gain is not known
    ],
)
def test_a_flow_far_behind_the_closed_form_stops_before_the_end(bits, steps, tmp_path):
    path = tmp_path / "closed_form.ckpt"
    torch.save({"format": FORMAT, "validation_bits": torch.tensor([4.0, 6.0])}, path)
    callback, trainer = StopBehindClosedForm(path), Mock(max_epochs=-1, max_steps=8, callbacks=[])
    trainer.configure_mock(sanity_checking=False, should_stop=False, **{"state.fn": "fit"})
    callback.on_train_start(trainer, None)
    trainer.global_step = 0
    while trainer.global_step < 8 and not trainer.should_stop:
        trainer.callback_metrics = {"val/bits_per_dim": bits[trainer.global_step]}
        trainer.global_step += 1
        if bits[trainer.global_step - 1] is not None:
            callback.on_validation_end(trainer, None)
    assert trainer.global_step == steps
    assert callback.stopped == (steps < 8)
