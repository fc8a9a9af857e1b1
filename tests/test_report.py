"""`rnode report`: the page in the browser, and the map of likelihood and cost over λ_K and λ_J."""

import json
import re
import shutil

import pytest
import yaml
from matplotlib import pyplot as plt

from helpers import EPOCHS, call, refused
from rnode.app.figures import COSTS, plot_penalties
from rnode.app.runs import read_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
whole = pytest.mark.slow(reason="a sweep of four runs")


def write_overrides(folder, overrides):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two λ_K and two seeds, and folders of other kinds."""
    folder = tmp_path_factory.mktemp("report")
    swept = ["reg.lambda_k=0,0.1", "seed=0,1", f"hydra.sweep.dir={folder / 'sweep'}"]
    options = ["trainer.max_epochs=2", "callbacks.figures.every_n_epochs=1", *swept]
    call("train", "-m", *EPOCHS, *options)
    write_overrides(folder / "evaluation", [])  # as `rnode evaluate` does too
    shutil.copytree(folder / "sweep" / "0", folder / "unfinished")
    (folder / "unfinished" / "result.json").unlink()
    shutil.copytree(folder / "sweep" / "0", folder / "broken")
    (folder / "broken" / "metrics.csv").write_text("step,val/bits_per_dim\n1,<script>\n")
    (folder / "foreign").mkdir()
    overrides = yaml.safe_load((folder / "sweep" / "0" / ".hydra" / "overrides.yaml").read_text())
    lost = [text.replace("lambda_k=0", "lambda_k='<b>'") for text in overrides]
    write_overrides(folder / "lost", lost)
    (folder / "lost" / "diverged.txt").write_text("z became NaN")
    names = ("sweep", "evaluation", "unfinished", "broken", "foreign", "lost")
    places = [str(folder / name) for name in names]
    call("report", *places, f"hydra.run.dir={folder / 'page'}")
    return folder


@whole
def test_a_report_compares_runs_wherever_they_lie(sweep):
    text = (sweep / "page" / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr.*?</tr>", text[: text.index("</table>")], re.DOTALL)
    cells = [re.findall(r"<td>(?:<span[^>]*>■</span> )?(.*?)</td>", row) for row in rows]
    header = re.findall("<th>(.*?)</th>", rows[0])
    assert header[:5] == ["run", "reg.lambda_k", "seed", "status", "val/bits_per_dim"]
    assert sorted(row[:4] for row in cells[1:]) == [
        ["lost", "&lt;b&gt;", "0", "diverged"],
        *([f"sweep/{i}", ("0", "0.1")[i // 2], str(i % 2), "finished"] for i in range(4)),
        ["unfinished", "0", "0", "unfinished"],
    ]
    (bold,) = re.findall('<tr class="best">.*?</tr>', text, re.DOTALL)
    least = min(float(row[4]) for row in cells[1:] if row[3] == "finished")
    assert f"<td>{least:.5g}</td>" in bold
    left_out = ("foreign: holds no run", "broken: cannot be read", "lost: diverged, z became NaN")
    for words in (*left_out, "rnode train", "pytorch-lightning: ", "reg.lambda_j=0.01\n"):
        assert words in text
    assert not re.search(r'(?:src|href)="(?!data:)|<script', text)  # it needs no other file


@whole
def test_runs_and_sweeps_end_with_a_report(sweep):
    for name in ("sweep/0", "sweep"):
        text = (sweep / name / "report.html").read_text(encoding="utf-8")
        assert text.count("image/svg+xml") == 6 + (name == "sweep")  # with a figure over λ_K
        assert text.count("image/png") == (4 if name == "sweep" else 1)
        assert ("Lines are means over seeds" in text) == (name == "sweep")
        assert len(set(re.findall(r'color: (#\w+)">■', text))) == (2 if name == "sweep" else 1)


def test_folders_without_runs_are_refused(tmp_path, capsys):
    write_overrides(tmp_path / "evaluation", [])
    (tmp_path / "empty").mkdir()
    for name, words in (("evaluation", "must be or hold folders of "), ("empty", "holds no run")):
        line, code = refused(capsys, "report", str(tmp_path / name), "hydra.run.dir=page")
        assert f"{tmp_path / name}" in line
        assert words in line
        assert code == 2


@whole
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_shows_the_report(sweep, width):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with started.chromium.launch(**options) as browser:
            tab = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
            errors = []
            tab.on("console", lambda message: errors.append(message.text))
            tab.goto((sweep / "page" / "report.html").as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
            assert tab.locator("img").count() == 7 + 5
            assert errors == []


def make_job(folder, overrides, *measured, **texts):
    """Write a job's folder: bits/dim, NFE and seconds, or how it failed."""
    write_overrides(folder, [f"{key}={value}" for key, value in overrides.items()])
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
