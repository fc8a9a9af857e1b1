"""What the folders of runs contain: how runs differ, how they ended, and what they measured."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from os.path import commonpath
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from rnode.app.schema import flatten
from rnode.app.sweep import DIVERGED, FAILED, OVERRIDES
from rnode.errors import one_line
from rnode.training.results import read_metrics, read_result

COLUMNS = {
    "val/bits_per_dim": ("val bits/dim", "{:.4f}"),
    "test/bits_per_dim": ("test bits/dim", "{:.4f}"),
    "train/nfe_forward": ("NFE train", "{:.0f}"),
    "val/nfe_forward": ("NFE val", "{:.0f}"),
    "train/seconds": ("seconds", "{:.1f}"),
}
LAMBDAS = {"reg.lambda_k": "λ_K", "reg.lambda_j": "λ_J"}
CLOCK = "val/seconds_total"  # seconds of training before a validation


@dataclass(frozen=True)
class Run:
    """A run, read from its folder."""

    folder: Path
    overrides: list[str]
    used: dict[str, str]  # what the run used, by the keys of configuration and overrides
    status: str  # finished, failed, diverged or unfinished
    result: dict[str, float | None]  # of result.json; empty unless the run has finished
    line: str  # why the run has not finished
    rows: list[dict[str, float]]  # of metrics.csv
    name: str  # of the folder, in the folder that holds all runs
    swept: dict[str, str] = field(default_factory=dict)  # of `used`, the overrides that differ

    @property
    def label(self) -> str:
        """How the run differs from others, whatever its seed."""
        return " ".join(f"{key}={value}" for key, value in self.swept.items() if key != "seed")

    def curve(self, key: str, against: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of two columns of metrics.csv in the rows that have both."""
        rows = [(row[against], row[key]) for row in self.rows if key in row and against in row]
        x, y = np.array(rows).reshape(-1, 2).T
        return x, y

    def cells(self) -> list[str]:
        """Return the texts of COLUMNS; of a run that has not finished, what it has measured."""
        bits, seconds = (self.curve(key, "step")[1] for key in ("val/bits_per_dim", CLOCK))
        so_far = {"val/bits_per_dim": bits.min()} if len(bits) else {}
        so_far |= {"train/seconds": seconds[-1]} if len(seconds) else {}
        numbers = [((self.result or so_far).get(name), form) for name, (_, form) in COLUMNS.items()]
        return ["" if number is None else form.format(number) for number, form in numbers]


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in and below the folders, in order of their names, 10 after 9.

    The second result has a line for each folder that holds no run, and for each broken run.
    """
    runs: dict[Path, Run] = {}
    problems = []
    for folder in folders:
        found = [file.parent.parent.resolve() for file in sorted(folder.rglob(OVERRIDES))]
        problems += [] if found else [f"{folder}: holds no run"]
        for run in filter(is_run, found):
            try:
                runs[run] = read_run(run)
            except Exception as error:  # whatever a foreign folder holds
                problems.append(f"{run}: cannot be read ({one_line(error)})")
    order = sorted(runs, key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(9), str(path)))
    root = commonpath([folder.parent for folder in order]) if order else ""
    keys = dict.fromkeys(key for run in runs.values() for key in parse(run.overrides))
    keys = [key for key in keys if len(values(runs.values(), key)) > 1]
    named = [
        replace(
            runs[folder],
            name=str(folder.relative_to(root)),
            swept={key: runs[folder].used.get(key, "") for key in keys},
        )
        for folder in order
    ]
    return named, problems


def best(runs: Iterable[Run]) -> set[str]:
    """Return the names of the runs, or the run, of the least validation bits/dim."""
    bits = {run.name: run.result.get("val/bits_per_dim") for run in runs}
    least = min((value for value in bits.values() if value is not None), default=None)
    return {name for name, value in bits.items() if value is not None and value == least}


def is_run(folder: Path) -> bool:
    """Whether a folder is of a training run; Hydra leaves the same files in others."""
    return any((folder / name).exists() for name in ("config.yaml", DIVERGED, FAILED))


def values(runs: Iterable[Run], key: str) -> set[str | None]:
    """Return the values that runs used; of one that failed early only its overrides are known."""
    known = (run for run in runs if key in run.used or (run.folder / "config.yaml").exists())
    return {run.used.get(key) for run in known}


def read_run(folder: Path) -> Run:
    """Read what a run has left in its folder."""
    given = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES))
    overrides, config = [str(text) for text in given], folder / "config.yaml"
    used = parse(overrides)
    if config.exists():
        used |= flatten(OmegaConf.to_container(OmegaConf.load(config)))
    used = {key: as_text(value) for key, value in used.items()}
    texts = read_metrics(folder / "metrics.csv")
    rows = [{key: float(cell) for key, cell in row.items()} for row in texts]
    return Run(folder, overrides, used, *read_end(folder), rows, folder.name)


def parse(overrides: list[str]) -> dict[str, str]:
    return dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)


def as_text(value: object) -> str:
    """Write equal numbers alike: 4e-3 of the command line is 0.004 of the configuration."""
    if not is_number(value):
        return str(value)
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e6 else repr(number)


def is_number(value: object) -> bool:
    """Return whether a number, or a text, is a finite number."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def read_end(folder: Path) -> tuple[str, dict[str, float | None], str]:
    """Return status, result and line of the run in `folder`."""
    for status, file in (("failed", FAILED), ("diverged", DIVERGED)):
        if (folder / file).exists():
            return status, {}, (folder / file).read_text(encoding="utf-8").strip()
    result = read_result(folder)
    if result is None:
        return "unfinished", {}, "was interrupted, or is still running"
    return "finished", result, ""
