"""Callbacks and loggers of a run, each alone."""

from matplotlib.figure import Figure

from helpers import EPOCHS, column
from rnode.training import callbacks
from rnode.training.checkpoint import load_checkpoint
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
