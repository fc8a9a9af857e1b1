"""`rnode report`: one section for each data set, damaged files, and the map over λ_K and λ_J."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from matplotlib import pyplot as plt

from helpers import EPOCHS, call, refused
from rnode.app.figures import COSTS, choose_colours, plot_penalties, plot_training
from rnode.app.report import as_texts
from rnode.app.runs import compare, decimals, read_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HEADER = "step,val/seconds_total,val/bits_per_dim,val/bits_per_dim_gaussian,test/bits_per_dim\n"
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
    tables = [re.sub("<.*?>", " ", table) for table in re.findall("<table>.*?</table>", text, re.S)]
    (table,) = tables  # all runs have the same data
    rows = {line.split()[0].removeprefix("&nbsp;"): line.split() for line in table.split("■")[1:]}
    assert {name: row[1] for name, row in rows.items()} == {
        **{f"sweep/{i}": "finished" for i in range(4)},
        **{"lost": "diverged", "unfinished": "unfinished"},
    }
    assert rows["lost"][-2:] == ["&lt;b&gt;", "0"]
    swept = [rows[f"sweep/{i}"][-2:] for i in range(4)]
    assert swept == [["0", "0"], ["0", "1"], ["0.1", "0"], ["0.1", "1"]]
    (bold,) = re.findall('<tr class="best">.*?</tr>', text, re.DOTALL)
    least = min((rows[f"sweep/{i}"][2] for i in range(4)), key=float)
    assert f"<span>{least}</span>" in bold
    left_out = ("foreign: holds no run", "broken: cannot be read", "lost: diverged, z became NaN")
    for words in (*left_out, "rnode train", "pytorch-lightning: ", "reg.lambda_j=0.01\n"):
        assert words in text
    assert not re.search(r'(?:src|href)="(?!data:)|<script', text)  # it needs no other file


@whole
def test_runs_and_sweeps_end_with_a_report(sweep):
    for name in ("sweep/0", "sweep"):
        text = (sweep / name / "report.html").read_text(encoding="utf-8")
        assert text.count("image/svg+xml") == 5 + 3 * (name == "sweep")  # maps over λ_K
        assert text.count("image/png") == (4 if name == "sweep" else 1)
        assert ("Lines are means over seeds" in text) == (name == "sweep")
        assert len(set(re.findall(r'color: (#\w+)">■', text))) == (2 if name == "sweep" else 1)


def test_folders_without_runs_are_refused(tmp_path, capsys):
    write_overrides(tmp_path / "evaluation", [])
    (tmp_path / "empty").mkdir()
    for name, words in (("evaluation", "must be or hold folders of "), ("empty", "holds no run")):
        line = refused(capsys, "report", str(tmp_path / name), "hydra.run.dir=page")
        assert f"{tmp_path / name}" in line
        assert words in line


def write_run(folder, overrides, bits, gaussian=3.0, **settings):
    """Write the files of a run that has finished."""
    write_overrides(folder, overrides)
    source, _, name = settings.pop("data").partition(" ")
    data = {"source": {"_target_": f"rnode.data.{source}"}, "name": name or None}
    config = {"dataset": data | settings, "reg": {"lambda_k": 0.01, "lambda_j": 0.01}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curve = "".join(f"{k},{k},{bits + 2 - k},{gaussian},\n" for k in range(3))
    (folder / "metrics.csv").write_text(f"{HEADER}{curve}3,,,,{bits}\n")
    result = {"val/bits_per_dim": bits, "test/bits_per_dim": bits, "train/seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    plt.imsave(folder / "samples.png", [[0.0, 1.0]])


@pytest.fixture
def outputs(tmp_path):
    folder = tmp_path / "outputs"
    write_run(folder / "digits" / "a", [], 2.0, data="images.digits")
    write_run(folder / "digits" / "b", ["dataset=digits", "seed=1"], 1.5, data="images.digits")
    write_run(folder / "toy" / "a", ["dataset=toy"], 1.0, data="densities.toy moons")
    write_run(folder / "table" / "a", ["dataset=table"], -4.0, 1e9, data="tables.table", path="h")
    write_run(folder / "table" / "b", ["model.hidden=8"], -4.5, data="tables.table", path="g")
    return folder


def report(outputs):
    call("report", str(outputs), f"hydra.run.dir={outputs.parent / 'page'}")
    return (outputs.parent / "page" / "report.html").read_text(encoding="utf-8")


def test_each_data_set_has_a_section_with_its_results_first(outputs):
    text = report(outputs)
    sections = text.split("<h2>")[1:]
    names = [section.partition("</h2>")[0] for section in sections]
    assert names == ["digits", "table path=h", "table path=g", "moons", "Commands and machines"]
    for section, best in zip(sections, ("digits/b", "table/a", "table/b", "toy/a"), strict=False):
        (bold,) = re.findall('<tr class="best">.*?</tr>', section, re.DOTALL)
        assert best in bold
        assert section.count("image/svg+xml") == 1  # no penalties, no curve without points
        assert (
            section.index("</table>") < section.index("image/svg+xml") < section.index(">Samples")
        )
        assert "λ" not in section
    columns = re.findall("<th>(.*?)</th>", sections[0])
    measured = ["val/bits_per_dim", "test/bits_per_dim", "train/seconds"]
    assert columns == ["run", "status", *measured, "seed"]


def test_a_gaussian_that_is_far_off_does_not_set_the_axis(outputs):
    runs, _ = read_runs([outputs / "table"])
    compare(runs)
    (figure,) = plot_training(runs, choose_colours(runs))
    low, high = figure.axes[0].get_ylim()
    plt.close(figure)
    assert -6 < low < high < 0


DAMAGES = {
    "metrics.csv": [
        lambda text: text[: len(text) // 2],
        lambda text: text[:-1],
        lambda text: text[:-9] + "\0" * 9,
        lambda text: text + "\0" * 9,
        lambda text: text.replace("step", "stop"),
        lambda text: "",
        lambda text: text.replace("1,1,", "1,x,"),
    ],
    "config.yaml": [lambda text: "", lambda text: "\0" * 99, lambda text: "a: [1"],
    "result.json": [lambda text: "", lambda text: text[:9]],
}


@pytest.mark.parametrize(("file", "damage"), [(f, d) for f, all in DAMAGES.items() for d in all])
def test_a_run_with_a_damaged_file_is_left_out_and_named(outputs, capsys, file, damage):
    path = outputs / "digits" / "a" / file
    path.write_text(damage(path.read_text()))
    text = report(outputs)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"left out: {path.parent}: cannot be read (")
    assert "Left out: " in text
    assert "digits/a" not in text.partition("<h2>")[2]


def test_resuming_a_run_with_damaged_curves_is_one_line(run, capsys):
    toy = ["dataset=toy", "dataset.train=64", "dataset.batch_size=32", "model.hidden=4"]
    toy += ["dataset.test=20", "dataset.validation=20", "logger=csv"]
    toy += ["callbacks.figures=null", "callbacks.refine_grid=null"]
    folder = run(*toy, "trainer.max_epochs=1")
    (folder / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes()[:-20] + b"\0" * 20)
    more = [*toy, "trainer.max_epochs=2", "ckpt_path=auto", f"hydra.run.dir={folder}"]
    assert f"{folder / 'metrics.csv'} is damaged" in refused(capsys, "train", *more)
    (folder / "metrics.csv").unlink()
    call("train", *more)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_all_figures_and_cuts_nothing_on_a_narrow_screen(outputs):
    playwright = pytest.importorskip("playwright.sync_api")
    long = [f"model.hidden={'1' * 60}", "trainer.gradient_clip_val=0.123456789"]
    write_run(outputs / "digits" / "long", long, 2.0, data="images.digits")
    report(outputs)
    cut = "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 "
    cut += "&& getComputedStyle(e).display !== 'inline').length"
    messages = []
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with playwright.sync_playwright() as started, started.chromium.launch(**options) as browser:
        for width in (400, 700, 1400):
            tab = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
            tab.on("console", lambda message: messages.append(message.text))
            tab.goto((outputs.parent / "page" / "report.html").as_uri())
            assert tab.evaluate("[...document.images].map(i => i.naturalWidth > 0)") == 10 * [True]
            assert messages == []
            tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert width == 1400 or tab.evaluate(cut) == 0


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
        **{"1.5": (0, 1), "3.0": (1, 1), "11.5": (2, 1)},
    }
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("$λ_J$", "$λ_K$")


def test_values_that_are_compared_have_equal_decimals():
    assert decimals([2.0755, 2.076, np.nan], digits=4) == 3
    assert decimals([7.2, 117.26], digits=4) == 1
    assert decimals([75, 117.0], digits=4) == decimals([12345.6], digits=4) == 0
    assert decimals([0.00123], digits=4) == 5  # 0.00123
    assert decimals([], digits=4) == 0
    rows = [["a", "finished", 2.0755, 117.0], ["b", "failed", None, None], ["c", "", 2.076, 87.0]]
    assert [row[2:] for row in as_texts(rows)] == [("2.0755", "117"), ("", ""), ("2.0760", "87")]


def test_other_swept_keys_and_a_guided_sweep_have_no_map(tmp_path):
    for number in range(5):
        others = {"reg.lambda_k": number % 2, "solver": number // 2}
        make_job(tmp_path / "others" / str(number), others | {"reg.lambda_j": 0.5}, 3, 24, 1)
        make_job(tmp_path / "none" / str(number), {"solver": number, "seed": number}, 3, 24, 1)
        scattered = {"reg.lambda_k": number, "reg.lambda_j": number / 2}
        make_job(tmp_path / "guided" / str(number), scattered, 3, 24, 1)
    for name in ("others", "none", "guided"):
        assert plot_penalties(read_runs([tmp_path / name])[0]) is None
