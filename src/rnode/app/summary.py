"""The table at the end of a run."""

import contextlib
import math
import sys

from rich.console import Console
from rich.table import Column, Table

from rnode.flow import Flow
from rnode.transforms import TableTransform, Transform

TABLE = {  # quantities, and their texts from metrics; what was not measured is left out
    "bits/dim (± standard error)": "{test/bits_per_dim:.4f} ± {test/bits_per_dim_se:.4f}",
    "negative log-likelihood, nats": "{nats:.3f} ± {nats_se:.3f}",
    "negative log-likelihood, nats (standardized)": "{standardized_nats:.3f}",
    "bits/dim of a Gaussian, validation set": "{val/bits_per_dim_gaussian:.4f}",
    "weights": "{weights:,}",
    "divergence": "{divergence}",
    "NFE forward per batch, training": "{train/nfe_forward:.0f}",
    "NFE backward per batch, training": "{train/nfe_backward:.0f}",
    "NFE forward per batch, test": "{test/nfe_forward:.0f}",
    "kinetic energy / d": "{test/kinetic:.4f}",
    "squared Jacobian norm / d": "{test/jacobian:.4f}",
    "seconds per training step": "{train/seconds_per_step:.3g}",
    "seconds: training, validation, whole run": "{train/seconds:.0f}, {val/seconds:.0f}, {all:.0f}",
}


def make_table(metrics: dict, flow: Flow, transform: Transform, title: str) -> Table:
    """Return the table at the end of a run."""
    nats = math.log(2) * flow.d
    values = metrics | {
        "nats": metrics["test/bits_per_dim"] * nats,
        "nats_se": metrics["test/bits_per_dim_se"] * nats,
        "weights": sum(parameter.numel() for parameter in flow.parameters()),
        "divergence": flow.test_probes,
    }
    if isinstance(transform, TableTransform):
        log_det = metrics["test/log_det"] - transform.log_det_whitening
        values["standardized_nats"] = values["nats"] + log_det
    table = quantities(title)
    for name, text in TABLE.items():
        with contextlib.suppress(KeyError):
            table.add_row(name, text.format_map(values))
    return table


def quantities(title: str) -> Table:
    """Return an empty table of quantities and their values."""
    value = Column("value", justify="right")
    return Table("quantity", value, title=title, title_justify="left")


def print_table(table: Table) -> str:
    """Print a table, and return its text. In a file or a pipe no cell is cut off."""
    width = None if sys.stdout.isatty() else 1000
    console = Console(record=True, markup=False, highlight=False, width=width)
    console.print(table)
    return console.export_text()
