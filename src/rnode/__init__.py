"""RNODE: continuous normalizing flows with kinetic and Jacobian regularization (Finlay et al., 2020), in plain PyTorch."""

from rnode.dynamics import Dynamics, Probes, State
from rnode.errors import DivergenceError, InputError
from rnode.flow import Flow, Piece, mlp, multiscale
from rnode.networks import Field, TimeConv2d, TimeLinear
from rnode.objective import bits_per_dim, log_normal, objective
from rnode.solver import Method, Solver
from rnode.transforms import Dequantize, Logit

__all__ = [
    "Dequantize",
    "DivergenceError",
    "Dynamics",
    "Field",
    "Flow",
    "InputError",
    "Logit",
    "Method",
    "Piece",
    "Probes",
    "Solver",
    "State",
    "TimeConv2d",
    "TimeLinear",
    "bits_per_dim",
    "log_normal",
    "mlp",
    "multiscale",
    "objective",
]
