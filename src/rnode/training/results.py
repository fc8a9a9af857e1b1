"""What a finished run has measured: metrics.csv, a row per logged step, and result.json."""

import csv
import json
import math
from pathlib import Path

from rnode.training.run_folder import whole_file

RESULT = "result.json"
TESTED = ("bits_per_dim", "bits_per_dim_se", "nfe_forward", "kinetic", "jacobian")


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv without their empty cells; no rows if there is no file.

    A last line that was cut short, by a full disk for example, is left out.
    """
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(lines)]


def write_result(folder: Path, tested: dict, best: float) -> dict[str, float | None]:
    """Write result.json, which marks the run as finished.

    Args:
        folder: the run folder.
        tested: the metrics of the test, by the names of metrics.csv.
        best: validation bits/dim of the tested weights.

    Returns:
        What the file holds: val/… of the tested weights, train/nfe_… of the last logged step,
        train/seconds without validation, test/…. What was not measured is None.
    """
    rows = read_metrics(folder / "metrics.csv")
    seconds = [
        float(row["train/seconds_per_epoch"]) for row in rows if "train/seconds_per_epoch" in row
    ]
    trained = next((row for row in reversed(rows) if "train/nfe_forward" in row), {})
    validated = [row for row in rows if "val/bits_per_dim" in row]
    chosen = min(validated, key=lambda row: abs(float(row["val/bits_per_dim"]) - best), default={})
    measured = {
        "val/bits_per_dim": best,
        "val/nfe_forward": chosen.get("val/nfe_forward", math.nan),
        "train/seconds": sum(seconds) if seconds else math.nan,
        **{
            f"train/{name}": trained.get(f"train/{name}", math.nan)
            for name in ("nfe_forward", "nfe_backward")
        },
        **{f"test/{name}": tested.get(f"test/{name}", math.nan) for name in TESTED},
    }
    numbers = {name: float(value) for name, value in measured.items()}
    result = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with whole_file(folder / RESULT, "w") as file:
        json.dump(result, file, indent=2)
    return result


def read_result(folder: Path) -> dict[str, float | None] | None:
    """Return the result of a finished run; None if the run has not finished."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
