"""sweep.png: panels over λ_K and λ_J."""

import json

import pytest
import yaml

from rnode.app.maps import plot_maps
from rnode.app.runs import read_runs


def make_job(folder, overrides, bits=None, nfe=None, seconds=None, **texts):
    """Write a job's folder; without `bits` it has not finished."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    if not texts:
        (folder / "config.yaml").write_text("{}")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    if bits is not None:
        result = {"val/bits_per_dim": bits, "val/nfe_forward": nfe, "train/seconds": seconds}
        (folder / "result.json").write_text(json.dumps(result))


def panels(folder):
    """The axes of sweep.png."""
    axes = plot_maps(read_runs([folder])[0]).axes
    return [ax for ax in axes if ax.get_label() != "<colorbar>"]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_map_has_every_job_in_its_place(tmp_path):
    """Two λ_K, three λ_J, two seeds: one job of twelve diverged, both jobs of one cell failed."""
    places = [(k, j, seed) for k in (0.1, 0) for j in (0, 10, 2) for seed in (0, 1)]
    for number, (k, j, seed) in enumerate(places):
        overrides = [f"reg.lambda_k={k}", f"reg.lambda_j={j}", f"seed={seed}", "model.hidden=4"]
        if (k, j) == (0, 10):
            make_job(tmp_path / str(number), overrides, failed="error")
        elif (k, j, seed) == (0.1, 2, 1):
            make_job(tmp_path / str(number), overrides, diverged="z became NaN")
        else:
            numbers = (10 * k + j + seed, 100 * k, 5 + seed)
            make_job(tmp_path / str(number), overrides, *numbers)
    jobs, _ = read_runs([tmp_path])
    assert [job.name for job in jobs] == [str(i) for i in range(12)]
    assert [job.status for job in jobs].count("failed") == 2
    assert (jobs[5].status, jobs[5].line) == ("diverged", "z became NaN")
    assert jobs[11].swept == {"reg.lambda_k": "0", "reg.lambda_j": "2", "seed": "1"}
    axes = panels(tmp_path)
    bits, nfe, seconds = (ax.images[0].get_array().filled(-1).tolist() for ax in axes)
    assert bits == [[0.5, 2.5, -1], [1.5, 3, 11.5]]
    assert nfe == [[0, 0, -1], [10, 10, 10]]
    assert seconds == [[5.5, 5.5, -1], [5.5, 5, 5.5]]
    assert (ticks(axes[0].xaxis), ticks(axes[0].yaxis)) == (["0", "2", "10"], ["0", "0.1"])
    shown = {text.get_text() for text in axes[0].texts}
    assert shown == {"0.5000", "2.5000", "×", "1.5000", "3.0000", "11.5000"}
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("$λ_J$", "$λ_K$")


def test_one_lambda_makes_curves_and_another_swept_key_makes_rows_of_them(tmp_path):
    jobs = [(1, "rk4"), (0, "rk4"), (0, "dopri5"), (1, "dopri5")]
    for number, (k, solver) in enumerate(jobs):
        swept = [f"reg.lambda_k={k}", f"solver={solver}"]
        make_job(tmp_path / "one" / str(number), swept, 3 + number, 24, 1)
        swept = [f"solver={solver}", f"seed={k}"]
        make_job(tmp_path / "none" / str(number), swept, 3 + number, 24, 1)
    axes = panels(tmp_path / "one")
    assert len(axes) == 6
    assert axes[0].lines[0].get_xydata().tolist() == [[0, 4], [1, 3]]
    assert axes[3].lines[0].get_xydata().tolist() == [[0, 5], [1, 6]]
    assert axes[3].get_title() == "val bits/dim – solver=dopri5"
    assert plot_maps(read_runs([tmp_path / "none"])[0]) is None


def test_scattered_lambdas_make_points_and_a_cross_where_a_job_failed(tmp_path):
    for number in range(6):
        swept = [f"reg.lambda_k=0.{number}", f"reg.lambda_j=0.{number + 1}"]
        make_job(tmp_path / str(number), swept, number, 24, 1)
    make_job(tmp_path / "6", ["reg.lambda_k=0.6", "reg.lambda_j=0.7"], failed="error")
    ax = panels(tmp_path)[0]
    points = ax.collections[0]
    assert points.get_array().tolist() == list(range(6))
    assert points.get_offsets()[2].tolist() == pytest.approx([0.3, 0.2])
    assert ax.lines[0].get_xydata().tolist() == [[0.7, 0.6]]
