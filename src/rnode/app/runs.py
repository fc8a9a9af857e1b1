"""What run folders contain: how runs differ, how they ended, and what they measured."""

import re
import shlex
from collections.abc import Iterable
from os.path import commonpath
from pathlib import Path

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rnode.app.schema import flatten
from rnode.errors import one_line
from rnode.training import results
from rnode.training.run_folder import ENVIRONMENT

COLUMNS = {
    "val/bits_per_dim": ("val bits/dim", "{:.4f}"),
    "test/bits_per_dim": ("test bits/dim", "{:.4f}"),
    "train/nfe_forward": ("NFE train", "{:.0f}"),
    "val/nfe_forward": ("NFE val", "{:.0f}"),
    "train/seconds": ("seconds", "{:.1f}"),
}
LAMBDAS = {"reg.lambda_k": "λ_K", "reg.lambda_j": "λ_J"}


class Run:
    """A training run, read from its folder."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        texts = [str(text) for text in OmegaConf.load(folder / results.OVERRIDES)]
        self.command = shlex.join(["rnode", "train", *texts])
        parsed = OverridesParser.create().parse_overrides(texts)
        self.overrides = {override.key_or_group: override.value() for override in parsed}
        config = load(folder / results.CONFIG)
        self.started = bool(config)  # a run that failed before has overrides alone
        settings = self.overrides | flatten(config)
        self.settings = {
            k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()
        }
        self.swept: dict[str, object] = {}  # the settings in which runs that are compared differ
        self.environment = load(folder / ENVIRONMENT)
        self.status, self.reason = results.read_status(folder)
        self.result = (results.read_result(folder) if self.status == "finished" else None) or {}
        rows = results.read_metrics(folder / results.METRICS)
        self.rows = [{key: float(cell) for key, cell in row.items()} for row in rows]

    def label(self, *ignored: str) -> str:
        """Return how the run differs from the others, apart from seed and `ignored` settings."""
        keys = [key for key in self.swept if key not in ("seed", *ignored)]
        return " ".join(f"{key}={self.swept[key]}" for key in keys if self.swept[key] != "")

    def curve(self, key: str, against: str) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y: the columns `against` and `key` of metrics.csv, in rows with both."""
        points = [(row[against], row[key]) for row in self.rows if key in row and against in row]
        x, y = np.array(points).reshape(-1, 2).T
        return x, y


def load(path: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in and below folders, 10 after 9, and a line about each one left out."""
    paths, runs, problems = set(), [], []
    for folder in folders:
        inside = {file.parent.parent.resolve() for file in folder.rglob(results.OVERRIDES)}
        problems += [] if inside else [f"{folder}: holds no run"]
        paths |= set(filter(results.is_run, inside))
    for path in sorted(paths, key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(9), str(path))):
        try:
            runs.append(Run(path))
        except Exception as error:  # whatever a damaged file raises
            problems.append(f"{path}: cannot be read ({one_line(error)})")
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    swept = [
        key
        for key in keys
        if len({run.settings.get(key) for run in runs if run.started or key in run.settings}) > 1
    ]
    root = commonpath([run.folder.parent for run in runs]) if runs else ""
    for run in runs:
        run.name = str(run.folder.relative_to(root))
        run.swept = {key: run.settings.get(key, "") for key in swept}
    return runs, problems


def best(runs: Iterable[Run]) -> Run | None:
    """Return the finished run of the least validation bits/dim."""
    measured = [run for run in runs if run.result.get(results.BITS) is not None]
    return min(measured, key=lambda run: run.result[results.BITS], default=None)


def tabulate(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Return a header, and a row of texts for each run."""
    swept = [LAMBDAS.get(key, key) for key in runs[0].swept]
    rows = []
    for run in runs:
        numbers = [(run.result.get(name), form) for name, (_, form) in COLUMNS.items()]
        cells = ["" if number is None else form.format(number) for number, form in numbers]
        rows.append([run.name, *map(str, run.swept.values()), run.status, *cells])
    return ["run", *swept, "status", *(label for label, _ in COLUMNS.values())], rows
