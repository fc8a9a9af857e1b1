"""`rnode report` of runs on several data sets, of damaged files, and on narrow screens."""

import json
import re
import shutil

import pytest
import yaml
from matplotlib import pyplot as plt

from helpers import call, refused
from rnode.app.figures import choose_colours, plot_training
from rnode.app.runs import compare, read_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
HEADER = "step,val/seconds_total,val/bits_per_dim,val/bits_per_dim_gaussian,test/bits_per_dim\n"


def write_run(folder, overrides, bits, gaussian=3.0, **settings):
    """Write the files of a run that has finished."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    source, _, name = settings.pop("data").partition(" ")
    data = {"source": {"_target_": f"rnode.data.{source}"}, "name": name or None}
    config = {"dataset": data | settings, "reg": {"lambda_k": 0.01, "lambda_j": 0.01}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curve = "".join(f"{k},{k},{bits + 2 - k},{gaussian},\n" for k in range(3))
    (folder / "metrics.csv").write_text(f"{HEADER}{curve}3,,,,{bits}\n")
    result = {"val/bits_per_dim": bits, "test/bits_per_dim": bits, "train/seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples").mkdir()
    plt.imsave(folder / "samples" / "tested.png", [[0.0, 1.0]])


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
    toy += ["dataset.test=20", "dataset.validation=20", "logger.wandb.mode=disabled"]
    toy += ["callbacks.figures=null", "callbacks.refine_grid=null"]
    folder = run(*toy, "trainer.max_epochs=1")
    (folder / "metrics.csv").write_bytes((folder / "metrics.csv").read_bytes()[:-20] + b"\0" * 20)
    more = [*toy, "trainer.max_epochs=2", "ckpt_path=auto", f"hydra.run.dir={folder}"]
    line, code = refused(capsys, "train", *more)
    assert f"{folder / 'metrics.csv'} is damaged" in line
    assert code == 2
    (folder / "metrics.csv").unlink()
    call("train", *more)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_nothing_is_cut_on_a_narrow_screen(outputs):
    playwright = pytest.importorskip("playwright.sync_api")
    long = [f"model.hidden={'1' * 60}", "trainer.gradient_clip_val=0.123456789"]
    write_run(outputs / "digits" / "long", long, 2.0, data="images.digits")
    report(outputs)
    cut = "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 "
    cut += "&& getComputedStyle(e).display !== 'inline').length"
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with playwright.sync_playwright() as started, started.chromium.launch(**options) as browser:
        for width in (400, 700, 1400):
            tab = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
            tab.goto((outputs.parent / "page" / "report.html").as_uri())
            tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert width == 1400 or tab.evaluate(cut) == 0
