"""The files of a run folder that say what was run, what was measured, and how the run ended."""

import csv
import json
import math
from pathlib import Path

from rnode.errors import require
from rnode.training.run_folder import whole_file

CONFIG, OVERRIDES, METRICS = "config.yaml", ".hydra/overrides.yaml", "metrics.csv"
CLOSED_FORM = "closed_form.ckpt"  # the best density without a network
RESULT, DIVERGED, FAILED = "result.json", "diverged.txt", "failed.txt"
BITS = "val/bits_per_dim"
GAUSSIAN = "val/bits_per_dim_gaussian"
MEASURES = ("bits_per_dim", "nfe_forward", "kinetic", "jacobian")  # of each split
TEST_METRICS = tuple(f"test/{name}" for name in (*MEASURES, "bits_per_dim_se"))
TRAIN_METRICS = ("train/seconds", "train/nfe_forward", "train/nfe_backward")
RESULTS = (BITS, "val/nfe_forward", *TRAIN_METRICS, *TEST_METRICS)  # the names in result.json


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv without empty cells; no rows if there is no file.

    Raises:
        InputError: if the file was damaged; a last line that is not complete is left out.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    complete = lines if text.endswith("\n") else lines[:-1]  # a full disk cuts the last one
    rows = [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(complete)]
    damaged = "\0" in text or any("step" not in row or None in row for row in rows)
    require(not damaged, f"{path} is damaged; a run goes on without it once it is removed")
    return rows


def write_result(folder: Path, tested: dict, best: float) -> dict[str, float | None]:
    """Write result.json, which marks the run as finished, and return what it holds.

    val/… belongs to the tested weights, whose bits/dim are `best`; train/seconds excludes
    validation; train/nfe_… belongs to the last logged step. What was not measured is None.
    """
    rows = read_metrics(folder / METRICS)
    validated = [row for row in rows if BITS in row]
    chosen = min(validated, key=lambda row: abs(float(row[BITS]) - best), default={})
    measured = tested | {name: cell for row in rows for name, cell in row.items()}
    measured |= {BITS: best, "val/nfe_forward": chosen.get("val/nfe_forward", "nan")}
    measured["train/seconds"] = measured.get("train/seconds_total", "nan")
    numbers = {name: float(measured.get(name, "nan")) for name in RESULTS}
    result = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
    with whole_file(folder / RESULT, "w") as file:
        json.dump(result, file, indent=2)
    return result


def read_result(folder: Path) -> dict[str, float | None] | None:
    """Return the result of a finished run; None if the run has not finished."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_status(folder: Path) -> tuple[str, str]:
    """Return finished, failed, diverged or unfinished, and why the run has not finished."""
    for path in (folder / FAILED, folder / DIVERGED):
        if path.exists():
            return path.stem, path.read_text(encoding="utf-8").strip()
    if (folder / RESULT).exists():
        return "finished", ""
    return "unfinished", "was interrupted, or is still running"
