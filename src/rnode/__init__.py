"""RNODE: continuous normalizing flows with kinetic and Jacobian regularization.

The method is that of Finlay et al. (2020). Public names are imported on first use (PEP 562), so
`import rnode.errors` does not import torch.
"""

import importlib
import os
import random
import warnings
from typing import Any

_MODULES = {
    "app.density": ("Density", "fit", "load"),
    "bases": ("Gaussian", "Mixture", "Normal"),
    "dynamics": ("Dynamics", "Probes", "State"),
    "errors": ("Diverged", "InputError"),
    "flow": ("FactorOut", "Flatten", "Flow", "Piece", "PieceSolution", "Solution", "Squeeze"),
    "models": ("mlp", "multiscale"),
    "networks": ("Field", "TimeConv2d", "TimeLinear"),
    "loss": ("bits_per_dim", "log_normal", "objective"),
    "solver": ("Method", "Solver"),
    "transforms": (
        "Batch",
        "Column",
        "Dequantize",
        "ImageTransform",
        "Logit",
        "TableTransform",
        "Transform",
    ),
    "variational": ("VariationalDequantization",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("rnode-flows")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rnode' has no attribute '{name}'")
    environment, state = dict(os.environ), random.getstate()
    with warnings.catch_warnings():
        module = importlib.import_module(f"rnode.{_MODULE_OF[name]}")
    random.setstate(state)  # Lightning's import changes these three
    os.environ.clear()
    os.environ.update(environment)
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
