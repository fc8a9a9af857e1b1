"""sweep.png: panels over λ_K and λ_J."""

import json

import yaml
from matplotlib import pyplot as plt

from rnode.app.figures import COSTS, plot_penalties
from rnode.app.runs import read_runs


def make_job(folder, overrides, *measured, **texts):
    """Write a job's folder: bits/dim, NFE and seconds, or how it failed."""
    (folder / ".hydra").mkdir(parents=True)
    overrides = [f"{key}={value}" for key, value in overrides.items()]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    if measured:
        (folder / "config.yaml").write_text("{}")
        (folder / "result.json").write_text(json.dumps(dict(zip(COSTS, measured, strict=True))))


def panels(folder):
    """The axes of sweep.png, without those of colour bars."""
    figure = plot_penalties(read_runs([folder])[0])
    figure.draw_without_rendering()  # a layout that does not fit would warn
    plt.close(figure)
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
    jobs, problems = read_runs([tmp_path, tmp_path / "empty"])
    assert problems == [f"{tmp_path / 'empty'}: holds no run"]
    assert [job.name for job in jobs] == [str(i) for i in range(12)]
    assert [job.status for job in jobs].count("failed") == 2
    assert (jobs[5].status, jobs[5].reason) == ("diverged", "z became NaN")
    assert jobs[11].swept == {"reg.lambda_k": 0, "reg.lambda_j": 2, "seed": 1}
    axes = panels(tmp_path)
    bits, nfe, seconds = (ax.images[0].get_array().filled(-1).tolist() for ax in axes)
    assert bits == [[0.5, 2.5, -1], [1.5, 3, 11.5]]
    assert nfe == [[0, 0, -1], [10, 10, 10]]
    assert seconds == [[5.5, 5.5, -1], [5.5, 5, 5.5]]
    assert (ticks(axes[0].xaxis), ticks(axes[0].yaxis)) == (["0", "2", "10"], ["0", "0.1"])
    texts = {text.get_text(): text.get_position() for text in axes[0].texts}
    assert texts == {
        **{"0.5": (0, 0), "2.5": (1, 0), "×": (2, 0)},
        **{"1.5": (0, 1), "3": (1, 1), "11.5": (2, 1)},
    }
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("$λ_J$", "$λ_K$")


def test_other_swept_keys_and_a_guided_sweep_have_no_map(tmp_path):
    for number in range(5):
        others = {"reg.lambda_k": number % 2, "solver": number // 2}
        make_job(tmp_path / "others" / str(number), others | {"reg.lambda_j": 0.5}, 3, 24, 1)
        make_job(tmp_path / "none" / str(number), {"solver": number, "seed": number}, 3, 24, 1)
        scattered = {"reg.lambda_k": number, "reg.lambda_j": number / 2}
        make_job(tmp_path / "guided" / str(number), scattered, 3, 24, 1)
    for name in ("others", "none", "guided"):
        assert plot_penalties(read_runs([tmp_path / name])[0]) is None
