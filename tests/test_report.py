"""`rnode report`: the page in the browser."""

import re
import shutil

import pytest
import yaml

from helpers import EPOCHS, call, refused

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
    assert {row[0]: row[1:4] for row in cells[1:]} == {
        "lost": ["&lt;b&gt;", "0", "diverged"],
        "sweep/0": ["0", "0", "finished"],
        "sweep/1": ["0", "1", "finished"],
        "sweep/2": ["0.1", "0", "finished"],
        "sweep/3": ["0.1", "1", "finished"],
        "unfinished": ["0", "0", "unfinished"],
    }
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
