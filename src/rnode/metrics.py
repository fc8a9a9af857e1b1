"""metrics.csv: what a run measured, a row a logged step."""

import csv
import io
from pathlib import Path

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from rnode.errors import WriteError, one_line
from rnode.files import whole_file

Row = dict[str, str | float]  # what a step has measured; a column that it has not is left out


class MetricsFile(Logger):
    """Appends each row as it is logged, so that nothing is kept in memory and nothing is lost with the process.

    A new column needs a new header: the file is then written beside and put in its place, never cut short. Of the rows that
    are there, those of training steps before `before` are kept, but for the test's: a run goes on after them.
    """

    name = version = ""

    def __init__(self, path: Path, before: int = 0):
        super().__init__()
        self.path, self.columns = path, []
        if rank_zero_only.rank == 0:
            rows = [row for row in read_metrics(path) if int(row["step"]) < before]
            self.write([row for row in rows if not any(key.startswith("test/") for key in row)])

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        row = metrics | {"step": step}
        if row.keys() <= set(self.columns):
            line = io.StringIO(newline="")
            csv.DictWriter(line, self.columns).writerow(row)
            try:
                with open(self.path, "a", newline="") as file:
                    file.write(line.getvalue())
            except OSError as error:
                raise WriteError(f"{self.path} could not be written ({one_line(error)})") from error
        else:
            self.write([*read_metrics(self.path), row])

    def write(self, rows: list[Row]) -> None:
        """These rows alone; no file if there are none."""
        self.columns = sorted(set().union(*rows))
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        with whole_file(self.path, "w") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def log_hyperparams(self, params: object) -> None:
        """They are in config.yaml."""


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, each with what it holds, without a last one cut short; none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        lines = file.readlines()
    whole = [line for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if value} for row in csv.DictReader(whole)]
