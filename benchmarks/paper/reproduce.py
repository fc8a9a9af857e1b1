"""`rnode reproduce`: train what a figure or the table of the paper needs, and plot it.

The runs lie in outputs/reproduce/SCALE/runs. Figures share them. A finished run is not repeated,
and an interrupted one resumes.
"""

import csv
import subprocess
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table
from rnode.paper import discussion
from rnode.paper.figures import PLOTS
from rnode.paper.runs import DATA, DOWNLOADED, FIGURES, Job

from rnode.app.summary import print_table
from rnode.errors import require

LONGEST = 30  # rows of a CSV that is printed; a longer one holds curves


def main(cfg: DictConfig) -> None:
    """Train what is missing; write a PNG, a CSV and a verdict, and print the last two."""
    given = [f"{kind}{cfg[kind]}" for kind in ("figure", "table", "discussion") if cfg[kind]]
    require(len(given) == 1, "give one of figure=1 to figure=5, table=1 and discussion=1")
    (name,), folder = given, Path(HydraConfig.get().runtime.output_dir)
    if cfg.discussion:
        show(name, folder, discussion.reproduce(folder / name, cfg.root))
        return
    wanted = FIGURES[name].runs(cfg.scale, folder / "runs")
    if cfg.train:
        train([run for run in wanted if not run.ended], cfg)
    runs = [run for run in wanted if run.ended]
    advice = "see the errors above" if cfg.train else "train=true trains what is missing"
    require(bool(runs), f"{folder / 'runs'}: holds no finished run for {name}; {advice}")
    verdict = PLOTS[name](runs, folder / name)
    if len(runs) < len(wanted):
        verdict += f" ({len(runs)} of {len(wanted)} runs have finished)"
    show(name, folder, verdict)


def show(name: str, folder: Path, verdict: str) -> None:
    """Write the verdict, and print it below the CSV."""
    (folder / f"{name}.txt").write_text(f"{verdict}\n", encoding="utf-8")
    with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if len(rows) <= LONGEST:
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        print_table(table)
    print(verdict)
    print(f"written to {folder / name}.png, .csv and .txt")


def train(runs: list[Job], cfg: DictConfig) -> None:
    """Start a sweep over seeds for each data set and recipe."""
    sweeps: dict[tuple[str, str], list[Job]] = {}
    for run in runs:
        sweeps.setdefault((run.data, run.recipe), []).append(run)
    for (data, recipe), members in sweeps.items():
        root = [f"dataset.root={cfg.root}"] if data in DOWNLOADED else []
        command = [
            *(sys.executable, "-m", "rnode", "train", "-m"),
            f"hydra.sweep.dir={members[0].folder.parent}",
            f"hydra.sweep.subdir={data}_{recipe}_${{seed}}",
            f"hydra/launcher={cfg.launcher}",
            f"seed={','.join(str(run.seed) for run in members)}",
            *(*DATA[data], *root, *members[0].overrides, "ckpt_path=auto", "logger=csv"),
        ]
        subprocess.run(command, check=False)  # a run that diverges is part of a figure
