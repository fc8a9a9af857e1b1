"""`rnode report`: a page for the browser about runs and sweeps. It needs no network."""

import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hydra.core.hydra_config import HydraConfig
from jinja2 import Environment
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig, OmegaConf

from rnode.app.maps import plot_maps
from rnode.app.quoting import shell_quote
from rnode.app.runs import CLOCK, COLUMNS, LAMBDAS, Run, best, read_runs
from rnode.errors import InputError, require
from rnode.training.checkpoint import load_checkpoint
from rnode.training.plots import COLOURS, plot_band
from rnode.training.results import GAUSSIAN, MEASURES
from rnode.training.run_folder import ENVIRONMENT, whole_file

INK = "#010203"  # stands in a figure for the colour of the page's text
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    "svg.fonttype": "none",
    "savefig.transparent": True,
}
CURVES = {  # what is logged, and against what
    "val/bits_per_dim": CLOCK,
    **dict.fromkeys((f"train/{name}" for name in MEASURES), "step"),
}
STAGES = {"train": "training", "val": "validation"}
AXES = {CLOCK: "seconds of training", "step": "training step"}
PANEL = {"figsize": (5, 3.4), "layout": "constrained"}
FRAMES = 60  # pictures of samples in a report, of all runs together
FEWEST, MOST = 2, 12  # of a run


class Evaluation(NamedTuple):
    """What `rnode evaluate` has written about a run."""

    run: str
    table: str
    picture: str  # of the most and least likely images, if any


def main(cfg: DictConfig) -> None:
    """Write report.html about the runs in and below the folders, and their evaluations there."""
    folders = [Path(folder).expanduser() for folder in cfg.folders]
    runs, problems = read_runs(folders)
    none = f"folders={list(cfg.folders)}: must be or hold folders of training runs"
    require(bool(runs), "; ".join(problems) or none)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    path = Path(HydraConfig.get().runtime.output_dir) / "report.html"
    write_report(runs, path, problems, list(read_evaluations(runs, folders)))
    print(f"{len(runs)} run(s); written to {path}")


def write_report(
    runs: list[Run],
    path: Path,
    problems: Sequence[str] = (),
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Write a page about runs and their evaluations; `problems` says what it leaves out."""
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    labels = list(dict.fromkeys(run.label for run in runs))
    shades = COLOURS
    if len(labels) > len(COLOURS):
        shades = list(map(to_hex, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(labels)))))
    colours = dict(zip(labels, shades, strict=False))
    frames = min(MOST, max(FEWEST, FRAMES // len(runs)))
    with plt.rc_context(STYLE):
        maps = plot_maps(runs)
        page = {
            "title": "/".join(runs[0].folder.parts[-2:]) if len(runs) == 1 else f"{len(runs)} runs",
            "swept": [LAMBDAS.get(key, key) for key in runs[0].swept],
            "columns": [label for label, _ in COLUMNS.values()],
            "runs": runs,
            "best": best(runs),
            "colours": colours,
            "panels": list(plot_panels(runs, colours)),
            "maps": "" if maps is None else as_svg(maps),
            "samples": {run.name: list(read_samples(run, frames)) for run in runs},
            "evaluations": evaluations,
            "commands": {run.name: command(run) for run in runs},
            "environments": {run.name: read_environment(run) for run in runs},
            "problems": problems,
        }
    text = Environment(autoescape=True).from_string(template).render(page)
    with whole_file(path, "w") as file:
        file.write(text)


def plot_panels(runs: list[Run], colours: dict[str, str]) -> Iterator[str]:
    """Plot curves of the runs, with a band for runs that differ in their seed alone; NFE against
    the Jacobian norm; and how likely the validation samples are."""
    gaussians = {round(value, 2) for run in runs for value in run.curve(GAUSSIAN, "step")[1]}
    for key, against in CURVES.items():
        stage, name = key.split("/")
        figure, ax = plt.subplots(**PANEL)
        for label, colour in colours.items():
            curves = [run.curve(key, against) for run in runs if run.label == label]
            if curves := [curve for curve in curves if len(curve[0])]:
                plot_band(ax, curves, color=colour)
        for gaussian in gaussians if name == "bits_per_dim" else ():
            ax.axhline(gaussian, color="0.5", linestyle="--", linewidth=1)
            at_the_right = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            ax.text(1, gaussian, "Gaussian", **at_the_right)
        ax.set(xlabel=AXES[against], ylabel=f"{STAGES[stage]} {MEASURES[name]}")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        yield as_svg(figure)
    figure, ax = plt.subplots(**PANEL)
    for run in runs:
        ax.scatter(*run.curve("train/nfe_forward", "train/jacobian"), s=12, c=colours[run.label])
    ax.set(xlabel=MEASURES["jacobian"], ylabel=MEASURES["nfe_forward"])
    yield as_svg(figure)
    figure, ax = plt.subplots(**PANEL)
    for run in runs:
        with contextlib.suppress(InputError):  # there is no best.ckpt yet, or it is damaged
            bits = load_checkpoint(run.folder / "best.ckpt")["validation_bits"]
            ax.hist(bits, bins=40, density=True, histtype="step", color=colours[run.label])
    ax.set(xlabel=f"{MEASURES['bits_per_dim']} of the validation samples", yticks=[])
    yield as_svg(figure)


def as_svg(figure: plt.Figure) -> str:
    """Return a figure as an element of a page, in the colours of its text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def read_samples(run: Run, count: int) -> Iterator[tuple[str, str]]:
    """Yield `count` pictures of samples or fewer: what each shows, and the picture."""
    pictures = sorted((run.folder / "samples").glob("*.png"))
    count = min(count, len(pictures))
    for k in np.linspace(0, len(pictures) - 1, count).round().astype(int):
        name = pictures[k].stem
        yield f"step {int(name)}" if name.isdigit() else f"{name} weights", embed(pictures[k])


def embed(picture: Path) -> str:
    """Return a PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def read_evaluations(runs: list[Run], folders: list[Path]) -> Iterator[Evaluation]:
    """Yield the evaluations of the runs that lie below the folders."""
    names = {run.folder: run.name for run in runs}
    files = dict.fromkeys(file for folder in folders for file in folder.rglob("evaluation.json"))
    for file in files:
        checkpoint = Path(json.loads(file.read_text(encoding="utf-8"))["ckpt_path"])
        name, picture = names.get(checkpoint.resolve().parent), file.with_name("extremes.png")
        if name is not None:
            table = file.with_name("evaluation.txt").read_text(encoding="utf-8")
            yield Evaluation(name, table, embed(picture) if picture.exists() else "")


def command(run: Run) -> str:
    """Return the command that repeats a run."""
    return " ".join(["rnode", "train", *map(shell_quote, run.overrides)])


def read_environment(run: Run) -> dict[str, str]:
    path = run.folder / ENVIRONMENT
    return OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
