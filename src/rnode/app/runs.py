"""What run folders contain: how runs differ, how they ended, and what they measured."""

import re
import shlex
from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rnode.app.schema import flatten
from rnode.errors import one_line, require
from rnode.training import results
from rnode.training.results import BITS
from rnode.training.run_folder import ENVIRONMENT

COLUMNS = (BITS, "test/bits_per_dim", "train/nfe_forward", "val/nfe_forward", "train/seconds")
LAMBDAS = ("reg.lambda_k", "reg.lambda_j")


class Run:
    """A training run, read from its folder."""

    def __init__(self, folder: Path):
        texts = [str(text) for text in load(folder / results.OVERRIDES)]
        parsed = OverridesParser.create().parse_overrides(texts)
        self.folder = folder
        self.name = folder.name
        self.command = shlex.join(["rnode", "train", *texts])
        self.overrides = {override.key_or_group: override.value() for override in parsed}
        config = flatten(load(folder / results.CONFIG))
        settings = self.overrides | {k: v for k, v in config.items() if v != {}}  # of logger=csv
        self.settings = {
            k: v if isinstance(v, float | int) else str(v) for k, v in settings.items()
        }
        self.data = name_data(settings)
        self.swept: dict[str, object] = {}  # the settings in which runs that are compared differ
        self.environment = load(folder / ENVIRONMENT)
        self.status, self.reason = results.read_status(folder)
        result = (self.status == "finished" and results.read_result(folder)) or {}
        self.result = {name: number for name, number in result.items() if number is not None}
        rows = results.read_metrics(folder / results.METRICS)
        self.rows = [{key: float(cell) for key, cell in row.items()} for row in rows]
        tested = [name for name in results.TEST_METRICS if name in self.result]
        complete = not tested or any(tested[0] in row for row in self.rows)  # the last to be logged
        require(complete, f"{results.METRICS} is truncated: it lacks the test")

    def label(self, *ignored: str) -> str:
        """Return how the run differs from the others, apart from seed and `ignored` settings."""
        keys = [k for k, v in self.swept.items() if v != "" and k not in ("seed", *ignored)]
        return " ".join(f"{key}={self.swept[key]}" for key in keys)

    def curve(self, key: str, against: str) -> np.ndarray:
        """Return x and y, (2, N): the columns `against` and `key` of metrics.csv."""
        points = [(row[against], row[key]) for row in self.rows if key in row and against in row]
        return np.array(points).reshape(-1, 2).T


def load(path: Path) -> dict:
    """Read a YAML file of a run; an empty dictionary if the run ended before it was written."""
    if not path.exists():
        return {}
    require(path.stat().st_size > 0, f"{path.name} is empty")
    return OmegaConf.to_container(OmegaConf.load(path))


def name_data(settings: dict) -> str:
    """Name a data set by its kind and all settings by which likelihoods differ."""
    source = str(settings.get("dataset.source._target_", settings.get("dataset", "digits")))
    name = settings.get("dataset.name") or source.rpartition(".")[2]
    keys = ["path", "size", "resize", "channels", "columns", "context", "integer"]
    keys += [] if settings.get("dataset.name") else ["root"]  # else where it was downloaded
    values = {key: settings.get(f"dataset.{key}") for key in keys}
    return " ".join([name, *(f"{key}={v}" for key, v in values.items() if v not in (None, ""))])


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in and below folders, 10 after 9, and a line about each one left out."""
    runs, problems, paths = [], [], set()
    for folder in folders:
        inside = {file.parent.parent.resolve() for file in folder.rglob(results.OVERRIDES)}
        problems += [] if inside else [f"{folder}: holds no run"]
        # `rnode evaluate` leaves overrides as well, but none of these files.
        names = (results.CONFIG, results.DIVERGED, results.FAILED)
        paths |= {path for path in inside if any((path / name).exists() for name in names)}
    for path in sorted(paths, key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(9), str(path))):
        try:
            runs.append(Run(path))
        except Exception as error:  # whatever a damaged file raises
            problems.append(f"{path}: cannot be read ({one_line(error)})")
    root = commonpath([run.folder.parent for run in runs]) if runs else ""
    for run in runs:
        run.name = str(run.folder.relative_to(root))
    compare(runs)
    return runs, problems


def compare(runs: list[Run]) -> None:
    """Set in which settings the runs differ from one another."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    swept = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    for run in runs:
        run.swept = {key: run.settings.get(key, "") for key in swept}


def tabulate(runs: list[Run], columns: Sequence[str] = COLUMNS) -> tuple[list[str], list[list]]:
    """Return a header, and a row for each run."""
    rows = [
        [run.name, run.status, *map(run.result.get, columns), *map(str, run.swept.values())]
        for run in runs
    ]
    return ["run", "status", *columns, *runs[0].swept], rows


def decimals(values: Sequence[float], digits: int) -> int:
    """Return with how many decimals to print values: the largest has `digits` significant digits.

    They are fewer if fewer print all values exactly, such as none for integers.
    """
    finite = np.array([value for value in values if np.isfinite(value)])
    largest = np.abs(finite).max(initial=0)
    count = max(0, digits - 1 - int(np.floor(np.log10(largest)))) if largest else 0
    while count and (finite == finite.round(count - 1)).all():
        count -= 1
    return count
