"""result.json holds the figures of metrics.csv."""

import json

import pytest

from helpers import TWO_STEPS, call, rows
from rnode.training.results import TESTED


def test_a_result_agrees_with_metrics_csv(tmp_path):
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=3", "trainer.limit_train_batches=2"]
    call("train", *TWO_STEPS, *epochs, "optimizer.lr=0.2", f"hydra.run.dir={tmp_path}")
    found = json.loads((tmp_path / "result.json").read_text())
    recorded = rows(tmp_path)
    validated = [row for row in recorded if "val/bits_per_dim" in row]
    assert len(validated) == 3
    best = min(validated, key=lambda row: float(row["val/bits_per_dim"]))
    bits = float(best["val/bits_per_dim"])
    assert found["val/bits_per_dim"] == pytest.approx(bits, rel=1e-6)
    assert found["val/nfe_forward"] == float(best["val/nfe_forward"])
    key = "train/seconds_per_epoch"
    seconds = [float(row[key]) for row in recorded if key in row]
    assert found["train/seconds"] == pytest.approx(sum(seconds))
    assert len(seconds) == 3
    tested = next(row for row in recorded if "test/bits_per_dim" in row)
    for name in TESTED:
        value = float(tested[f"test/{name}"])
        assert found[f"test/{name}"] == pytest.approx(value, rel=1e-6), name
    assert found["train/nfe_forward"] == 24
