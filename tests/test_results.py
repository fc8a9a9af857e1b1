"""result.json holds the figures of metrics.csv."""

import json

import pytest

from rnode.errors import InputError
from rnode.training.results import read_metrics, write_result

METRICS = """step,val/bits_per_dim,val/nfe_forward,train/nfe_forward,train/nfe_backward,\
train/seconds_total,test/bits_per_dim
0,,,20,30,,
1,3.5,45,,,,
2,,,24,36,1.5,
3,3.0,51,,,,
4,,,26,38,6.0,
5,3.2,57,,,,
5,,,,,,3.25
6,,,99"""  # a full disk cut the last line


def test_a_result_agrees_with_metrics_csv(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    assert read_metrics(tmp_path / "metrics.csv")[-1] == {"step": "5", "test/bits_per_dim": "3.25"}
    tested = {"test/bits_per_dim": 3.25, "test/kinetic": 0.0, "test/jacobian": float("nan")}
    result = write_result(tmp_path, tested, best=3.0)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result == {
        "val/bits_per_dim": 3.0,
        "val/nfe_forward": 51,
        "train/seconds": 6.0,
        "train/nfe_forward": 26,
        "train/nfe_backward": 38,
        "test/bits_per_dim": 3.25,
        "test/bits_per_dim_se": None,
        "test/nfe_forward": None,
        "test/kinetic": 0.0,
        "test/jacobian": None,
    }
    (tmp_path / "metrics.csv").unlink()
    unknown = dict.fromkeys(result)
    assert write_result(tmp_path, {}, best=3.0) == unknown | {"val/bits_per_dim": 3.0}


@pytest.mark.parametrize("damaged", ["a,b\n1,2\n", "step,a\n1,2,3\n", "step,a\n1,2\n\0\n"])
def test_damaged_metrics_are_refused(tmp_path, damaged):
    (tmp_path / "metrics.csv").write_text(damaged)
    with pytest.raises(InputError, match="is damaged"):
        read_metrics(tmp_path / "metrics.csv")
