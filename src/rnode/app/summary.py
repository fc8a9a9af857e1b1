"""The table at the end of a run."""

import contextlib
import math

from rich.table import Table

from rnode.app.printing import quantities
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
    "seconds: training, whole run": "{train/seconds:.0f}, {all:.0f}",
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
