import math

import pytest
import torch

from conftest import Linear, close, make_flow
from plain import PlainFlow
from rnode import Flow, InputError, Method, Piece, Probes, Solver, log_normal, mlp, multiscale, objective

TIGHT = Method("dopri5", rtol=1e-9, atol=1e-9)
SOLVER = Solver(Method("rk4"), Method("dopri5"))


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((1, 28, 28), 10),
        ((3, 32, 32), 14),
        ((1, 8, 8), 6),
        ((1, 7, 5), 2),
        ((2, 4, 4), 2),
        ((5, 12, 40), 6),
        ((1, 14, 14), 6),
    ],
)
def test_pieces_are_counted_as_in_the_paper(shape, pieces):
    flow = multiscale(shape, SOLVER, Probes(), hidden=4)
    assert len(flow.pieces) == pieces
    state = flow(torch.zeros(2, *shape))
    assert flow.nfe == (16 * pieces, 0)
    assert state.z.shape == (2, math.prod(shape))


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 30, 30), (1, 3, 8), (2,), (0, 8, 8), (1, 8, 2.5), ()])
def test_shapes_that_cannot_be_halved_are_refused(shape):
    with pytest.raises(InputError, match=r"dataset.shape=\["):
        multiscale(shape, SOLVER, Probes())


def test_the_refusal_names_a_shape_that_is_taken():
    with pytest.raises(InputError, match="28×28"):
        multiscale((1, 30, 30), SOLVER, Probes())
    multiscale((1, 28, 28), SOLVER, Probes(), hidden=2)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"layers": 1}, {"pieces": 0}, {"hidden": "64"}])
@pytest.mark.parametrize(("build", "shape"), [(multiscale, (1, 8, 8)), (mlp, (2,))])
def test_bad_sizes_are_refused(build, shape, wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(InputError, match=f"model.{key}={value}"):
        build(shape, SOLVER, Probes(), **wrong)


@pytest.mark.parametrize(("build", "shape"), [(multiscale, (3, 16, 8)), (mlp, (5,)), (mlp, (1, 3, 3))])
def test_a_new_flow_is_the_identity_but_for_the_order_of_the_entries(build, shape):
    flow = build(shape, SOLVER, Probes(), hidden=4)
    x = torch.randn(2, *shape)
    for training, rounding in ((True, 0), (False, 3e-6)):  # adaptive methods end by interpolating, which rounds
        state = flow.train(training)(x)
        torch.testing.assert_close(state.z.sort(1).values, x.flatten(1).sort(1).values, rtol=0, atol=rounding)
        assert not any(integral.any() for integral in state[1:])
        torch.testing.assert_close(flow.inverse(state.z), x, rtol=0, atol=2 * rounding)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2, 16, 8), (3,), (1, 2, 2)])
def test_forward_then_inverse_is_the_identity(shape):
    flow = make_flow(shape, test=TIGHT) if min(shape[1:], default=4) >= 4 else make_mlp(shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    z = flow.eval()(x).z
    assert (z - x.flatten(1)).abs().max() > 0.05
    torch.testing.assert_close(flow.inverse(z), x, rtol=1e-7, atol=1e-7)


def make_mlp(shape):
    flow = mlp(shape, Solver(Method("rk4"), TIGHT), Probes(), hidden=4).double()
    torch.nn.init.normal_(flow.pieces[0].field.layers[-1].weight)
    return flow


def test_log_prob_of_the_multiscale_flow_against_slogdet_of_its_full_jacobian():
    """The whole flow, two scales, squeeze and factoring out: change of variables by brute force."""
    flow = make_flow((1, 8, 8), test=TIGHT, divergence="exact").eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    log_prob = flow.log_prob(x)
    for b in range(2):
        z = flow(x[b : b + 1]).z
        jacobian = torch.autograd.functional.jacobian(lambda y: flow(y[None]).z[0], x[b]).reshape(64, 64)
        expected = log_normal(z)[0] + torch.linalg.slogdet(jacobian).logabsdet
        assert abs(log_prob[b] - log_normal(z)[0]) > 0.01
        torch.testing.assert_close(log_prob[b], expected, rtol=1e-7, atol=1e-7)


def test_the_gaussian_that_a_linear_flow_models():
    """z = e^A x with z normal makes x normal with covariance e^−A e^−Aᵀ: its log-density is known."""
    A = torch.tensor([[0.5, 0.3], [-0.2, -0.4]], dtype=torch.float64)
    flow = Flow((2,), [], [Piece(Linear(A))], (2,), Solver(Method("rk4"), TIGHT), Probes("exact")).eval()
    spread = torch.matrix_exp(-A)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(2).double(), spread @ spread.T)
    x = torch.randn(100, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x), rtol=1e-8, atol=1e-8)
    assert close(flow.sample(40000).T.cov(), gaussian.covariance_matrix, 0.03)
    assert close(flow.sample(40000, temperature=0.5).T.cov(), gaussian.covariance_matrix / 4, 0.03)


def test_integrals_are_the_sums_over_the_pieces():
    flow = make_flow((1, 8, 8))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    seen = []
    for piece in flow.pieces:
        piece.register_forward_hook(lambda module, args, state: seen.append(state))
    state = flow(x)
    assert len(seen) == 6
    for name in ("l", "E", "n"):
        torch.testing.assert_close(getattr(state, name), sum(getattr(s, name) for s in seen))


def against_the_plain_recipe(flow, plain, x):
    """Same weights, data and probes: the two losses agree to 1e-6, their gradients to 1e-4."""
    torch.manual_seed(7)
    loss = objective(flow(x), 0.3, 0.2)
    torch.manual_seed(7)
    plain_loss = plain.loss(x, 0.3, 0.2)
    assert math.isclose(loss.item(), plain_loss.item(), rel_tol=1e-6)
    loss.backward()
    plain_loss.backward()
    ours = [p.grad.flatten() for piece in flow.pieces for layer in piece.field.layers for p in (layer.weight, layer.bias)]
    theirs = [p.grad.flatten() for net in plain.nets for pair in zip(net.weights, net.biases, strict=True) for p in pair]
    assert close(torch.cat(ours), torch.cat(theirs), 1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (Method("rk4", step_size=1 / 16), {"method": "rk4", "options": {"step_size": 1 / 16}}),
        (Method("dopri5", rtol=1e-8, atol=1e-8), {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}),
    ],
)
@pytest.mark.parametrize("gradient", ["backprop", "adjoint", "checkpoint"])
def test_loss_and_gradient_are_those_of_the_plain_recipe(shape, method, arguments, gradient):
    """Steps so small that the adjoint's gradient and the exact one have one limit."""
    flow = make_flow(shape, train=method, gradient=gradient)
    against_the_plain_recipe(flow, PlainFlow(flow, **arguments), torch.randn(3, *shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
def test_the_adjoint_is_the_plain_recipes_in_float32_at_the_papers_step(shape):
    """rk4 with step 0.25 and the adjoint on both sides: the same discretization, in the precision of training."""
    flow = make_flow(shape, gradient="adjoint").float()
    plain = PlainFlow(flow, method="rk4", options={"step_size": 0.25})
    against_the_plain_recipe(flow, plain, torch.randn(3, *shape))


def test_without_penalties_the_objective_and_its_gradient_are_ffjords():
    """λ = 0: the mean negative log-likelihood a dimension, whatever E and n are."""
    gradients = []
    for loss_of in (
        lambda state: objective(state, 0.0, 0.0),
        lambda state: -(torch.distributions.Normal(0, 1).log_prob(state.z).sum(1) + state.l).mean() / 64,
    ):
        torch.manual_seed(3)
        flow = make_flow((1, 8, 8))
        state = flow(torch.randn(3, 1, 8, 8, dtype=torch.float64))
        assert (state.E > 0).all()
        assert (state.n > 0).all()
        loss_of(state).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3,)])
def test_log_prob_and_sample_take_any_batch_shape(shape, batch):
    flow = make_flow(shape).eval()
    x = flow.sample(batch)
    assert x.shape == (*batch, *shape)
    assert not x.requires_grad
    assert flow.log_prob(x).shape == batch
    if len(batch) == 1:
        assert flow.sample(batch[0]).shape == x.shape


def test_a_batch_of_another_shape_is_refused():
    flow = make_flow((1, 8, 8))
    with pytest.raises(InputError, match="shape of x"):
        flow(torch.zeros(2, 1, 8, 4).double())
    with pytest.raises(InputError, match="shape of z"):
        flow.inverse(torch.zeros(2, 63).double())


def test_training_and_evaluation_use_their_own_method():
    flow = make_flow((1, 8, 8), test=Method("euler", step_size=0.5))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    flow.train()(x)
    assert flow.nfe[0] == 6 * 16
    flow.eval()(x)
    assert flow.nfe[0] == 6 * 2


@pytest.mark.parametrize(("dtype", "state"), [("float32", torch.float32), ("float64", torch.float64)])
def test_the_states_type_is_as_asked_for(dtype, state):
    flow = mlp((2,), Solver(Method("rk4"), Method("dopri5"), dtype=dtype), Probes())
    assert all(part.dtype == state for part in flow(torch.randn(3, 2)))
    assert all(part.dtype == torch.float64 for part in flow.double()(torch.randn(3, 2).double()))
    assert flow.float().pieces[0].field.layers[0].weight.dtype == torch.float32


def test_evaluation_needs_no_autograd():
    flow = make_flow((1, 8, 8)).eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.inference_mode():
        inference = flow(x, generators)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    torch.testing.assert_close(inference, flow(x, generators))
