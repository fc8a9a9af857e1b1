"""Densities of x given c, and the encoder of c."""

import numpy as np
import pytest
import torch

from helpers import TIGHT
from rnode import Field, Flow, InputError, Method, Piece, Probes, Solver, TimeLinear
from rnode.data.conditions import Conditions, Label, Numeric

GRID = Method("rk4", steps=100)
RADAU = Method("rk4", "radau", steps=24)


@pytest.mark.parametrize(
    ("method", "gradient"),
    [(TIGHT, "backprop"), (RADAU, "backprop"), (GRID, "checkpoint"), (GRID, "adjoint")],
)
def test_the_conditional_gaussian_that_a_linear_flow_models(method, gradient):
    """f = A z + B c + b moves x to e^A x + ∫ e^{A(1 − t)} dt (B c + b)."""
    field = Field(TimeLinear, [2, 2], k=3).double()
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        field.layers[0].weight[:, 0] = 0  # no time
    weight, bias = field.layers[0].weight, field.layers[0].bias
    A, B = weight[:, 4:], weight[:, 1:4]
    solver = Solver(method, method, gradient=gradient, dtype="float64")
    flow = Flow((2,), [Piece(field)], solver, Probes("exact"), k=3)
    x, c = torch.randn(6, 2).double(), torch.randn(6, 3).double()
    shift = torch.linalg.solve(A, (torch.matrix_exp(A) - torch.eye(2)) @ (B @ c.T + bias[:, None]))
    precision = torch.matrix_exp(A).T @ torch.matrix_exp(A)
    mean = -torch.linalg.solve(torch.matrix_exp(A), shift).T
    normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.testing.assert_close(flow.log_prob(x, c), normal.log_prob(x), rtol=1e-7, atol=1e-7)
    z = torch.randn(6, 2).double()
    ends = torch.linalg.solve(torch.matrix_exp(A), z.T - shift).T
    torch.testing.assert_close(flow.inverse(z, c), ends, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.trajectory(z, c)[-1], ends, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(flow.log_prob(x, c).sum(), (weight, bias))
    expected = torch.autograd.grad(normal.log_prob(x).sum(), (weight, bias))
    # The closed form has no time, which is the first input.
    torch.testing.assert_close(found[0][:, 1:], expected[0][:, 1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_numbers_are_standardized_and_labels_become_unit_vectors():
    years, makers = np.array([1990.5, 2000.25, 2010.0]), np.array(["b", "a", "b"])
    fit_to = {"year": years, "maker": makers, "size": np.array([10, 2] * 10)}
    others = {"number": np.arange(300), "rare": np.array([10, 2] * 9), "new": np.array([True])}
    conditions = Conditions.fit(fit_to | others)
    labels = {name for name, column in conditions.columns.items() if isinstance(column, Label)}
    assert labels == {"maker", "size", "new"}  # the others are numeric
    conditions = Conditions.fit(fit_to)
    c = conditions.encode({"year": years, "maker": makers, "size": [2, 2, 10]}, 3)
    assert c.shape == (3, conditions.size) == (3, 5)
    torch.testing.assert_close(c[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(c[:, 0].std(correction=0), torch.tensor(1.0))
    assert c[:, 0].diff().gt(0).all()
    assert c[:, 1:].tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    copy = Conditions.from_state(conditions.state())
    one = copy.encode({"year": 1990.5, "maker": "b", "size": 2}, 4)  # one value for all samples
    assert torch.equal(one, c[:1].expand(4, 5))
    assert Conditions({}).encode({}, 3).shape == (3, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"year": [1.0], "maker": ["c"]}, "context.maker=c: must be one of a, b"),
        ({"year": ["x"], "maker": ["a"]}, "context.year=x: must be a number"),
        ({"year": [np.nan], "maker": ["a"]}, "context.year: must be finite"),
        ({"year": [1.0]}, "context.maker: the conditions are year, maker"),
        ({"year": 1.0, "maker": "a", "town": 3}, "context.town: the conditions are year, maker"),
        ({"year": 1.0, "maker": ["a", "b"]}, "context.maker: has 2 values for 1 samples"),
    ],
)
def test_values_that_a_condition_cannot_have(values, message):
    conditions = Conditions({"year": Numeric(0.0, 1.0), "maker": Label(("a", "b"))})
    with pytest.raises(InputError, match=message):
        conditions.encode(values, 1)
