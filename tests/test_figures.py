"""sweep.png: panels over λ_K and λ_J."""

import json

import pytest
import yaml

from rnode.app.figures import plot_penalties
from rnode.app.runs import best, read_runs


def make_job(folder, overrides, *measured, **texts):
    """Write a job's folder: bits/dim, NFE and seconds, or how it failed."""
    (folder / ".hydra").mkdir(parents=True)
    overrides = [f"{key}={value}" for key, value in overrides.items()]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    if measured:
        names = ("val/bits_per_dim", "val/nfe_forward", "train/seconds")
        (folder / "config.yaml").write_text("{}")
        (folder / "result.json").write_text(json.dumps(dict(zip(names, measured, strict=True))))


def panels(folder):
    """The axes of sweep.png, without those of colour bars."""
    figure = plot_penalties(read_runs([folder])[0])
    figure.draw_without_rendering()  # a layout that does not fit would warn
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_map_has_every_job_in_its_place(tmp_path):
    """Two λ_K, three λ_J, two seeds: one job of twelve diverged, both jobs of one cell failed."""
    places = [(k, j, seed) for k in (0.1, "0.0") for j in (0, "1e1", 2) for seed in (0, 1)]
    for number, (k, j, seed) in enumerate(places):
        overrides = {"reg.lambda_k": k, "reg.lambda_j": j, "seed": seed, "model.hidden": 4}
        if (k, j) == ("0.0", "1e1"):
            make_job(tmp_path / str(number), overrides, failed="error")
        elif (k, j, seed) == (0.1, 2, 1):
            make_job(tmp_path / str(number), overrides, diverged="z became NaN\n")
        else:
            k, j = float(k), float(j)
            make_job(tmp_path / str(number), overrides, 10 * k + j + seed, 100 * k, 5 + seed)
    jobs, _ = read_runs([tmp_path])
    assert [job.name for job in jobs] == [str(i) for i in range(12)]
    assert [job.status for job in jobs].count("failed") == 2
    assert (jobs[5].status, jobs[5].reason) == ("diverged", "z became NaN")
    assert jobs[11].swept == {"reg.lambda_k": 0, "reg.lambda_j": 2, "seed": 1}
    assert best(jobs) is jobs[6]
    axes = panels(tmp_path)
    bits, nfe, seconds = (ax.images[0].get_array().filled(-1).tolist() for ax in axes)
    assert bits == [[0.5, 2.5, -1], [1.5, 3, 11.5]]
    assert nfe == [[0, 0, -1], [10, 10, 10]]
    assert seconds == [[5.5, 5.5, -1], [5.5, 5, 5.5]]
    assert (ticks(axes[0].xaxis), ticks(axes[0].yaxis)) == (["0", "2", "10"], ["0", "0.1"])
    texts = {text.get_text(): text.get_position() for text in axes[0].texts}
    assert texts == {
        **{"0.5000": (0, 0), "2.5000": (1, 0), "×": (2, 0)},
        **{"1.5000": (0, 1), "3.0000": (1, 1), "11.5000": (2, 1)},
    }
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("$λ_J$", "$λ_K$")


def test_one_lambda_makes_curves_and_another_swept_key_makes_rows_of_them(tmp_path):
    jobs = [(1, "rk4"), (0, "rk4"), (0, "dopri5"), (1, "dopri5"), (1, "simpson")]
    for number, (k, solver) in enumerate(jobs):
        overrides = {"reg.lambda_k": k, "solver": solver}
        make_job(tmp_path / "one" / str(number), overrides, 3 + number, 24, 1)
        make_job(tmp_path / "none" / str(number), {"solver": solver, "seed": k}, 3, 24, 1)
    axes = panels(tmp_path / "one")
    assert len(axes) == 6  # none for a solver with one λ_K
    assert axes[0].lines[0].get_xydata().tolist() == [[0, 4], [1, 3]]
    assert axes[3].lines[0].get_xydata().tolist() == [[0, 5], [1, 6]]
    titles = [part.get_suptitle() for part in axes[0].figure.figure.subfigs]
    assert titles == ["solver=rk4", "solver=dopri5"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("$λ_K$", "val bits/dim")
    assert plot_penalties(read_runs([tmp_path / "none"])[0]) is None


def test_scattered_lambdas_make_points(tmp_path):
    for number in range(6):
        overrides = {"reg.lambda_k": f"0.{number}", "reg.lambda_j": f"0.{number + 1}"}
        make_job(tmp_path / str(number), overrides, number, 24, 1)
    make_job(tmp_path / "6", {"reg.lambda_k": 0.6, "reg.lambda_j": 0.7}, failed="error")
    (points,) = panels(tmp_path)[0].collections
    assert points.get_array().filled(-1).tolist() == [*range(6), -1]
    assert points.get_offsets()[2].tolist() == pytest.approx([0.3, 0.2])
    assert points.get_offsets()[6].tolist() == pytest.approx([0.7, 0.6])


def test_a_job_that_failed_early_differs_in_its_own_overrides_alone(tmp_path):
    make_job(tmp_path / "0", {"reg.lambda_k": 0, "model.hidden": 4}, 3, 24, 1)
    make_job(tmp_path / "1", {"reg.lambda_k": -1}, failed="must be at least 0")
    jobs, problems = read_runs([tmp_path, tmp_path / "empty"])
    assert [job.swept for job in jobs] == [{"reg.lambda_k": 0}, {"reg.lambda_k": -1}]
    assert problems == [f"{tmp_path / 'empty'}: holds no run"]
