"""`rnode report`: the page in the browser."""

import re
import shutil

import pytest
import yaml

from helpers import TWO_STEPS, call, refused
from rnode.app.report import read_samples
from rnode.app.runs import read_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
SEEN = ["trainer.max_epochs=2", "trainer.max_steps=-1", "trainer.limit_train_batches=2"]

whole = pytest.mark.slow(reason="a sweep of four runs")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two λ_K and two seeds, an evaluation of one job, and folders of other kinds."""
    folder = tmp_path_factory.mktemp("report")
    swept = ["reg.lambda_k=0,0.1", "seed=0,1", f"hydra.sweep.dir={folder / 'sweep'}"]
    call("train", "-m", *TWO_STEPS, *SEEN, "callbacks.figures.every_n_epochs=1", *swept)
    trained = str(folder / "sweep" / "0" / "best.ckpt")
    call("evaluate", trained, "samples=1", f"hydra.run.dir={folder / 'evaluation'}")
    shutil.copytree(folder / "sweep" / "0", folder / "going")  # as far as a run that still goes on
    (folder / "going" / "result.json").unlink()
    shutil.copytree(folder / "sweep" / "0", folder / "broken")
    (folder / "broken" / "metrics.csv").write_text("step,val/bits_per_dim\n1,<script>\n")
    (folder / "foreign").mkdir()
    (folder / "lost" / ".hydra").mkdir(parents=True)
    overrides = ["reg.lambda_k=<b>"]
    (folder / "lost" / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / "lost" / "diverged.txt").write_text("z became NaN")
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    """The path of a report about everything in the folder of `sweep`."""
    names = ("sweep", "evaluation", "going", "broken", "foreign", "lost")
    places = [str(sweep / name) for name in names]
    call("report", *places, f"hydra.run.dir={sweep / 'page'}")
    return sweep / "page" / "report.html"


@whole
def test_a_report_compares_runs_wherever_they_lie(sweep, page):
    text = page.read_text(encoding="utf-8")
    rows = re.findall(r"<tr.*?</tr>", text[: text.index("</table>")], re.DOTALL)
    cells = [re.findall(r"<td>(?:<span[^>]*></span>)?(.*?)</td>", row) for row in rows]
    header = re.findall("<th>(.*?)</th>", rows[0])
    assert header[:4] == ["run", "λ_K", "seed", "status"]
    runs = {row[0]: row[1:] for row in cells[1:]}
    assert {name: row[:3] for name, row in runs.items()} == {
        "going": ["0", "0", "unfinished"],
        "lost": ["&lt;b&gt;", "", "diverged"],
        "sweep/0": ["0", "0", "finished"],
        "sweep/1": ["0", "1", "finished"],
        "sweep/2": ["0.1", "0", "finished"],
        "sweep/3": ["0.1", "1", "finished"],
    }
    # What is known of a run that is not finished: its least validation bits/dim so far.
    assert runs["going"][3] == runs["sweep/0"][3]
    assert text.count('class="best"') == 1
    assert "foreign: holds no run" in text
    assert re.search(r"broken: cannot be read", text)
    assert "z became NaN" in text
    assert "most and least likely images, sweep/0" in text
    assert "rnode train" in text
    assert "pytorch-lightning" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)|<script>.*<script>', text)  # self-contained


@whole
def test_runs_and_sweeps_end_with_a_report(sweep):
    for name in ("sweep/0", "sweep"):
        text = (sweep / name / "report.html").read_text(encoding="utf-8")
        assert text.count("<svg") == 7 + (name == "sweep")  # with a figure over λ_K
        assert "step 4" in text


@whole
def test_samples_of_a_long_run_are_thinned_out(sweep):
    (run,), problems = read_runs([sweep / "sweep" / "0"])
    assert (run.name, problems) == ("0", [])
    labels = [label for label, _ in read_samples(run, 12)]
    assert labels == ["step 2", "step 4", "tested weights"]
    assert [label for label, _ in read_samples(run, 1)] == ["step 2"]


def test_folders_without_runs_are_refused(tmp_path, capsys):
    (tmp_path / "evaluation" / ".hydra").mkdir(parents=True)
    (tmp_path / "evaluation" / ".hydra" / "overrides.yaml").write_text("[]")
    evaluation = str(tmp_path / "evaluation")
    line, _ = refused(capsys, "report", evaluation, f"hydra.run.dir={tmp_path / 'page'}")
    assert "must be or hold folders of training runs" in line
    (tmp_path / "empty").mkdir()
    line, _ = refused(
        capsys, "report", str(tmp_path / "empty"), f"hydra.run.dir={tmp_path / 'page'}"
    )
    assert line == f"error: {tmp_path / 'empty'}: holds no run"


@whole
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_a_browser_shows_the_report(page, width, scheme):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with started.chromium.launch(**options) as browser:
            tab = browser.new_page(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
            )
            errors = []
            tab.on("console", lambda message: errors.append(message.text))
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.goto(page.as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            broken = "[...document.images].filter(i => !i.hidden && !i.naturalWidth).length"
            assert tab.evaluate(broken) == 0
            assert tab.locator("svg").count() == 8
            shown = tab.locator("figure", has_text="sweep/0, ").locator("img:visible")
            last = shown.get_attribute("alt")
            tab.get_by_label("training step of the samples of sweep/0").fill("0")
            assert (last, shown.get_attribute("alt")) == (
                "samples, sweep/0, tested weights",
                "samples, sweep/0, step 2",
            )
            colours = "getComputedStyle(document.body).color"
            axis = "getComputedStyle(document.querySelector('svg text')).fill"
            assert tab.evaluate(colours) == tab.evaluate(axis)
            assert errors == []
