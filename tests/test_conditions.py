"""Densities of x given c."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import DOPRI5
from rnode import (
    Field,
    Flow,
    InputError,
    Method,
    Piece,
    Probes,
    Solver,
    TimeConv2d,
    TimeLinear,
    mlp,
    multiscale,
)
from rnode.data.conditions import Conditions, Label, Numeric

TIGHT = Method("dopri5", rtol=1e-9, atol=1e-9)
GRID = Method("rk4", step_size=0.01)
RADAU = Method("rk4", "radau", steps=24)
PARTS = (Solver(DOPRI5, DOPRI5), Probes("exact"))


def random_field(layer, sizes, context):
    field = Field(layer, sizes, context).double()
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return field


def concatenated(field, t, z, c):
    """The textbook recipe: time and c as further inputs of every layer."""
    sides, h = z.shape[2:], z
    for i, layer in enumerate(field.layers):
        given = torch.cat([t.expand(len(z), 1), c], dim=1)
        given = given.view(*given.shape, *[1] * len(sides)).expand(*given.shape, *sides)
        inputs = torch.cat([given, h], dim=1)
        conv = isinstance(layer, TimeConv2d)
        call = F.conv2d if conv else F.linear
        bias = layer.bias
        if conv and i > 0:  # it sees softplus − log 2
            bias = bias - math.log(2) * layer.weight[:, 3:].flatten(1).sum(1)
        h = call(inputs, layer.weight, bias, **({"padding": 1} if conv else {}))
        h = F.softplus(h, threshold=1e9) if i + 1 < len(field.layers) else h
    return h


@pytest.mark.parametrize(
    ("layer", "sizes", "shape"),
    [(TimeLinear, [3, 5, 5, 3], (3,)), (TimeConv2d, [2, 4, 4, 2], (2, 4, 6))],
)
def test_c_is_a_further_input_of_every_layer(layer, sizes, shape):
    field = random_field(layer, sizes, context=2)
    t, z = torch.tensor(0.4).double(), torch.randn(4, *shape).double()
    c, eps = torch.randn(4, 2).double(), torch.randn(3, 4, *shape).double()
    expected = concatenated(field, t, z, c)
    torch.testing.assert_close(field(t, z, c), expected, rtol=1e-12, atol=1e-12)
    f, product = field.vjp(t, z, eps, c)
    torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-12)
    for b in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, b=b: concatenated(field, t, x[None], c[b : b + 1])[0], z[b]
        )
        full = jacobian.reshape(z[0].numel(), -1)
        torch.testing.assert_close(product[:, b].flatten(1), eps[:, b].flatten(1) @ full)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", [TIGHT, GRID, RADAU], ids=["dopri5", "rk4", "radau"])
def test_the_conditional_gaussian_that_a_linear_flow_models(method, gradient):
    """f = A z + B c + b moves x to e^A x + ∫ e^{A(1 − t)} dt (B c + b)."""
    field = random_field(TimeLinear, [2, 2], context=3)
    with torch.no_grad():
        field.layers[0].weight[:, 0] = 0  # no time
    weight, bias = field.layers[0].weight, field.layers[0].bias
    A, B = weight[:, 4:], weight[:, 1:4]
    solver = Solver(method, method, gradient=gradient, dtype="float64")
    flow = Flow((2,), [Piece(field)], solver, Probes("exact"), context=3)
    x, c = torch.randn(6, 2).double(), torch.randn(6, 3).double()
    shift = torch.linalg.solve(A, (torch.matrix_exp(A) - torch.eye(2)) @ (B @ c.T + bias[:, None]))
    precision = torch.matrix_exp(A).T @ torch.matrix_exp(A)
    mean = -torch.linalg.solve(torch.matrix_exp(A), shift).T
    normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.testing.assert_close(flow.log_prob(x, c), normal.log_prob(x), rtol=1e-7, atol=1e-7)
    z = torch.randn(6, 2).double()
    ends = torch.linalg.solve(torch.matrix_exp(A), z.T - shift).T
    torch.testing.assert_close(flow.inverse(z, c), ends, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.trajectory(z, context=c)[-1], ends, rtol=1e-6, atol=1e-6)
    flow.log_prob(x, c).sum().backward()
    found = [p.grad.clone() for p in field.parameters()]
    flow.zero_grad()
    normal.log_prob(x).sum().backward()
    for got, parameter in zip(found, field.parameters(), strict=True):
        got, wanted = got, parameter.grad
        if got.dim() == 2:
            got, wanted = got[:, 1:], wanted[:, 1:]  # the closed form has no time
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [False, True])
def test_one_c_for_all_samples_or_one_for_each(images):
    make, shape = (multiscale, (1, 8, 8)) if images else (mlp, (3,))
    flow = make(shape, *PARTS, hidden=4, pieces=1, context=2).eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, c = torch.rand(4, *shape), torch.randn(2)
    each = flow.log_prob(x, c.expand(4, 2))
    torch.testing.assert_close(flow.log_prob(x, c), each)
    assert not torch.allclose(flow.log_prob(x, c + 1), each)
    assert flow.sample((2, 3), context=c).shape == (2, 3, *shape)
    assert flow.sample((2, 2), context=torch.randn(2, 2, 2)).shape == (2, 2, *shape)


def test_a_missing_or_misshapen_c_is_refused():
    flow = mlp((3,), *PARTS, context=2)
    for context in (None, torch.zeros(3), torch.zeros(5, 2)):
        with pytest.raises(InputError, match=r"must be \(2,\) or \(4, 2\)"):
            flow.log_prob(torch.zeros(4, 3), context)
    with pytest.raises(InputError, match="must be left out"):
        mlp((3,), *PARTS).log_prob(torch.zeros(4, 3), torch.zeros(2))


def test_numbers_are_standardized_and_labels_become_unit_vectors():
    years, makers = np.array([1990.5, 2000.25, 2010.0]), np.array(["b", "a", "b"])
    fit_to = {"year": years, "maker": makers, "size": np.array([10, 2, 10])}
    conditions = Conditions.fit(fit_to | {"number": np.arange(300)})
    kinds = {name: type(column) for name, column in conditions.columns.items()}
    assert kinds == {"year": Numeric, "maker": Label, "size": Label, "number": Numeric}
    conditions = Conditions.fit(fit_to)
    assert conditions.columns["size"].classes == ("2", "10")
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


def test_columns_that_no_encoder_fits():
    with pytest.raises(InputError, match="name: has more than 100 different labels"):
        Conditions.fit({"name": np.arange(101).astype(str)})
    assert Conditions.fit({"name": np.arange(100).astype(str)}).size == 100
    assert Conditions.fit({"name": np.arange(100)}).size == 100
    with pytest.raises(InputError, match="x: is constant in the training split"):
        Conditions.fit({"x": np.full(3, 0.5)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"year": [1.0], "maker": ["c"]}, "context.maker=c: must be one of a, b"),
        ({"year": ["x"], "maker": ["a"]}, "context.year=x: must be a number"),
        ({"year": [np.nan], "maker": ["a"]}, "context.year: must be finite"),
        ({"year": [1.0]}, "context.maker: must be given"),
        ({"year": 1.0, "maker": "a", "town": 3}, "context.town: the conditions are year, maker"),
        ({"year": 1.0, "maker": ["a", "b"]}, "context.maker: has 2 values for 1 samples"),
    ],
)
def test_values_that_a_condition_cannot_have(values, message):
    conditions = Conditions({"year": Numeric(0.0, 1.0), "maker": Label(("a", "b"))})
    with pytest.raises(InputError, match=message):
        conditions.encode(values, 1)
