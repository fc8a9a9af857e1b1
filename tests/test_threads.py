"""The number of threads of a run."""

from types import SimpleNamespace

import torch

from helpers import TWO_STEPS, column
from rnode.training import threads


def test_a_run_takes_the_fastest_number_of_threads_and_looks_again(run, monkeypatch, capsys):
    """A clock by which a call takes as long as the table says for the present number of threads."""
    seconds, taken, now = {1: 4.0, 2: 2.0, 4: 3.0, 8: 1.0}, [1], [0.0]

    def clock():
        now[0] += seconds[taken[-1]]
        return now[0]

    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    fixed = run(*TWO_STEPS, "trainer.max_steps=8", "threads=4", folder="fixed")
    assert taken == [1, 4]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "cpu_count", lambda: 8)
    monkeypatch.setattr(threads, "WINDOW", 2)
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=clock))
    taken[:] = [1]
    run(*TWO_STEPS, "trainer.max_steps=4")
    assert taken == [1, 1, 2, 4, 2]  # 8 is not tried: 4 are slower than 2
    assert "2 of 8 threads: a gradient takes 4 s with 1, 2 s with 2, 3 s with 4" in (
        capsys.readouterr().out
    )
    seconds[2] = 9.0
    resumed = run(*TWO_STEPS, "trainer.max_steps=8", "ckpt_path=auto")
    assert taken[5:] == [2, 1, 2, 1]
    assert column(resumed, "train/loss") == column(fixed, "train/loss")
