"""What a finished run has measured: metrics.csv, a row per logged step, and result.json."""

import csv
import json
import math
from pathlib import Path

from rnode.training.run_folder import whole_file

RESULT = "result.json"
GAUSSIAN = "val/bits_per_dim_gaussian"
MEASURES = {  # of training, validation and test, as figures call them
    "bits_per_dim": "bits/dim",
    "nfe_forward": "NFE (forward)",
    "kinetic": "kinetic energy / d",
    "jacobian": "squared Jacobian norm / d",
}
TRAINED = ("train/nfe_forward", "train/nfe_backward")
TESTED = ("bits_per_dim", "bits_per_dim_se", "nfe_forward", "kinetic", "jacobian")


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv without empty cells; no rows if there is no file."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        lines = [line for line in file if line.endswith("\n")]  # a full disk cuts the last one
    return [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(lines)]


def write_result(folder: Path, tested: dict, best: float) -> dict[str, float | None]:
    """Write result.json, which marks the run as finished, and return what it holds.

    val/… is of the tested weights, whose bits/dim are `best`; train/seconds is without validation;
    train/nfe_… is of the last logged step. What was not measured is None.
    """
    rows = read_metrics(folder / "metrics.csv")
    seconds = [float(row.get("train/seconds_per_epoch", 0)) for row in rows]
    trained = [row for row in rows if "train/nfe_forward" in row] or [{}]
    validated = [row for row in rows if "val/bits_per_dim" in row]
    chosen = min(validated, key=lambda row: abs(float(row["val/bits_per_dim"]) - best), default={})
    measured = {"val/bits_per_dim": best, "val/nfe_forward": chosen.get("val/nfe_forward")}
    measured["train/seconds"] = sum(seconds) or None
    measured |= {name: trained[-1].get(name) for name in TRAINED}
    measured |= {f"test/{name}": tested.get(f"test/{name}") for name in TESTED}
    numbers = {name: float("nan" if v is None else v) for name, v in measured.items()}
    result = {name: v if math.isfinite(v) else None for name, v in numbers.items()}
    with whole_file(folder / RESULT, "w") as file:
        json.dump(result, file, indent=2)
    return result


def read_result(folder: Path) -> dict[str, float | None] | None:
    """Return the result of a finished run; None if the run has not finished."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
