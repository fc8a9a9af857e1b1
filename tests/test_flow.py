import math

import pytest
import torch

from helpers import DOPRI5, RK4, TIGHT, Linear, close, make_flow
from plain import PlainFlow
from rnode import Flow, Method, Piece, Probes, Solver, log_normal, mlp, multiscale, objective
from rnode.errors import Diverged, InputError

SOLVER = Solver(RK4, DOPRI5)


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [((1, 28, 28), 10), ((3, 32, 32), 14), ((1, 7, 5), 2), ((2, 4, 4), 2), ((5, 12, 40), 6)],
)
def test_pieces_are_counted_as_in_the_paper(shape, pieces):
    flow = multiscale(shape, SOLVER, Probes(), hidden=4)
    assert len(flow.pieces) == pieces
    solution = flow.solve(torch.zeros(2, *shape))
    assert [piece.nfe_forward for piece in solution.pieces] == [16] * pieces
    assert (solution.nfe_forward, solution.nfe_backward) == (16 * pieces, 0)
    assert solution.state.z.shape == (2, math.prod(shape))
    assert all(len(piece.field.layers) == 4 for piece in flow.pieces)
    assert multiscale(shape, SOLVER, Probes()).pieces[0].field.layers[1].out_channels == 64


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (multiscale, (1, 30, 30), "cannot halve 15×15; use images of 28×28"),
        (multiscale, (1, 9, 8), "cannot halve 9×8; use images of 8×8"),
        (multiscale, (2,), "4 or more high and wide"),
        (mlp, (3, 0), "must be positive sizes"),
    ],
)
def test_shapes_that_a_flow_cannot_have_are_refused(build, shape, message):
    with pytest.raises(InputError, match=message) as refused:
        build(shape, SOLVER, Probes())
    assert str(refused.value).startswith(f"shape={list(shape)}: ")


@pytest.mark.parametrize(
    ("build", "shape"), [(multiscale, (3, 16, 8)), (mlp, (5,)), (mlp, (1, 3, 3))]
)
def test_a_new_flow_is_the_identity_except_for_the_order_of_the_entries(build, shape):
    flow = build(shape, SOLVER, Probes(), hidden=4)
    x = torch.randn(2, *shape)
    for training, rounding in ((True, 0), (False, 3e-6)):  # adaptive methods interpolate at the end
        state = flow.train(training)(x)
        z, same = state.z.sort(1).values, x.flatten(1).sort(1).values
        torch.testing.assert_close(z, same, rtol=0, atol=rounding)
        assert not any(integral.any() for integral in state[1:])
        torch.testing.assert_close(flow.inverse(state.z), x, rtol=0, atol=2 * rounding)
        torch.testing.assert_close(flow.as_x(state.z), x, rtol=0, atol=rounding)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2, 16, 8), (3,)])
def test_forward_then_inverse_is_the_identity(shape):
    flow = make_flow(shape, test=TIGHT).eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    z = flow(x).z
    assert (z - x.flatten(1)).abs().max() > 0.05
    torch.testing.assert_close(flow.inverse(z), x, rtol=1e-7, atol=1e-7)


def test_log_prob_of_the_multiscale_flow_against_slogdet_of_its_full_jacobian():
    """The whole flow, two scales, squeeze and factoring out: change of variables by brute force."""
    method = Method("rk4", steps=12)
    flow = make_flow((1, 8, 8), test=method, divergence="exact", pieces=1).eval()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    log_prob = flow.log_prob(x)
    flow.test_probes = Probes()  # z does not depend on them
    # Samples do not interact: the sum over the batch has the Jacobians of both.
    jacobian = torch.autograd.functional.jacobian(lambda y: flow(y).z.sum(0), x)
    log_det = torch.linalg.slogdet(jacobian.flatten(2).transpose(0, 1)).logabsdet
    log_q = log_normal(flow(x).z)
    assert ((log_prob - log_q).abs() > 0.01).all()
    torch.testing.assert_close(log_prob, log_q + log_det, rtol=1e-6, atol=1e-6)


def test_the_gaussian_that_a_linear_flow_models():
    """z = e^A x with z normal: x is normal with covariance e^−A e^−Aᵀ, of known log-density."""
    A = torch.tensor([[0.5, 0.3], [-0.2, -0.4]], dtype=torch.float64)
    flow = Flow((2,), [Piece(Linear(A))], Solver(RK4, TIGHT), Probes("exact")).eval()
    spread = torch.matrix_exp(-A)
    covariance = spread @ spread.T
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance)
    x = torch.randn(100, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(x), gaussian.log_prob(x), rtol=1e-8, atol=1e-8)
    assert close(flow.sample(40000).T.cov(), covariance, 0.03)
    assert close(flow.sample(40000, temperature=0.5).T.cov(), covariance / 4, 0.03)
    frames = flow.trajectory(x, intervals=4)
    expected = torch.stack([x @ torch.matrix_exp(-A * k / 4).T for k in range(5)])
    torch.testing.assert_close(frames, expected, rtol=1e-7, atol=1e-7)


STEPS_16 = Method("rk4", steps=16), {"method": "rk4", "options": {"step_size": 1 / 16}}
ADAPTIVE = Method("dopri5", rtol=1e-8, atol=1e-8), {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,)])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize(("method", "options"), [STEPS_16, ADAPTIVE], ids=["rk4", "dopri5"])
def test_loss_and_gradient_are_those_of_the_plain_recipe(shape, gradient, method, options):
    """The steps are so small that the adjoint's gradient and the exact one agree."""
    flow = make_flow(shape, train=method, gradient=gradient, pieces=1)
    x = torch.randn(3, *shape, dtype=torch.float64)
    plain = PlainFlow(flow, **options)
    torch.manual_seed(7)
    loss = objective(flow(x), 0.3, 0.2)
    torch.manual_seed(7)
    plain_loss = plain.loss(x, 0.3, 0.2)
    assert math.isclose(loss.item(), plain_loss.item(), rel_tol=1e-6)
    loss.backward()
    plain_loss.backward()
    for piece, net in zip(flow.pieces, plain.nets, strict=True):
        layers = piece.field.layers
        ours = [p.grad.flatten() for layer in layers for p in (layer.weight, layer.bias)]
        pairs = zip(net.weights, net.biases, strict=True)
        theirs = [p.grad.flatten() for pair in pairs for p in pair]
        assert close(torch.cat(ours), torch.cat(theirs), 1e-4)


def test_a_batch_of_another_shape_is_refused():
    flow = make_flow((1, 8, 8), k=3)
    with pytest.raises(InputError, match=r"x of shape \(2, 1, 8, 4\): must be \(B, 1, 8, 8\)"):
        flow(torch.zeros(2, 1, 8, 4).double())
    with pytest.raises(InputError, match=r"z of shape \(2, 63\): must be \(B, 64\)"):
        flow.inverse(torch.zeros(2, 63).double(), torch.zeros(3))
    for method in (flow, flow.log_prob, flow.distribution().log_prob):
        with pytest.raises(InputError, match=r"c of shape \(0,\): must be \(…, 3\)"):
            method(torch.zeros(2, 1, 8, 8).double())


def test_a_conditional_flow_is_another_flow_for_each_c():
    """c (k,) is for all samples, c (*batch, k) for each."""
    flow = make_flow((3,), k=2, divergence="exact", test=TIGHT).eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    c = torch.randn(4, 2, dtype=torch.float64)
    each = torch.stack([flow.log_prob(x[i], c[i]) for i in range(4)])
    torch.testing.assert_close(flow.log_prob(x, c), each, rtol=1e-6, atol=1e-7)
    assert (each - flow.log_prob(x, c[0]))[1:].abs().min() > 1e-3
    paired = flow.log_prob(x.view(2, 2, 3), c.view(2, 2, 2))
    torch.testing.assert_close(paired.flatten(), each, rtol=1e-6, atol=1e-7)
    torch.manual_seed(5)
    sampled = flow.sample(4, c)
    torch.manual_seed(5)
    assert torch.equal(sampled, flow.inverse(torch.randn(4, 3).double(), c))


def test_a_solve_that_diverged_names_its_piece():
    flow = make_flow((1, 8, 8), train=DOPRI5)
    with torch.no_grad():
        flow.pieces[2].field.layers[-1].bias.fill_(float("nan"))
    with pytest.raises(Diverged, match="in piece 3$"):
        flow(torch.randn(2, 1, 8, 8, dtype=torch.float64))


def test_training_and_evaluation_use_their_own_method():
    flow = make_flow((1, 8, 8), test=Method("euler", steps=2))
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for training, nfe in ((True, 16), (False, 2)):
        solution = flow.train(training).solve(x)
        assert solution.nfe_forward == 6 * nfe
        assert flow.solve_inverse(solution.state.z)[1] == 6 * nfe


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_state_has_the_dtype_of_the_solver_or_a_more_precise_one(dtype):
    flow = mlp((2,), Solver(RK4, DOPRI5, dtype=dtype), Probes())
    x = torch.randn(3, 2)
    assert all(part.dtype == getattr(torch, dtype) for part in flow(x))
    assert all(part.dtype == torch.float64 for part in flow.double()(x.double()))


@torch.no_grad()
def test_a_trajectory_of_an_image_ends_in_its_inverse():
    flow = make_flow((1, 8, 8)).eval()
    z = torch.randn(3, 64).double()
    frames = flow.trajectory(z, intervals=2)
    assert frames.shape == (2 * len(flow.pieces) + 1, 3, 1, 8, 8)
    assert torch.equal(frames[0], flow.as_x(z))
    torch.testing.assert_close(frames[-1], flow.inverse(z), rtol=1e-3, atol=1e-4)
    # The last scale's pieces do not move the half that was factored out before them.
    moved = (frames[1] - frames[0]).abs()
    assert moved.max() > 1e-4
    held = flow.as_x(torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1).double())[0].bool()
    assert moved[:, held].max() == 0


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize("divergence", ["exact", "gaussian"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3,)])
def test_empty_batches_give_empty_results(shape, divergence, gradient):
    for training in (True, False):
        flow = make_flow(shape, gradient=gradient, divergence=divergence).train(training)
        x = torch.empty(0, *shape, dtype=torch.float64, requires_grad=True)
        flow.log_prob(x).sum().backward()
        assert x.grad.shape == x.shape
        assert flow(x).z.shape == (0, flow.d)
        assert flow.log_prob(torch.empty(2, 0, *shape)).shape == (2, 0)
        assert flow.sample((0, 2)).shape == (0, 2, *shape)
        frames = flow.trajectory(torch.empty(0, flow.d), intervals=3)
        assert frames.shape == (3 * len(flow.pieces) + 1, 0, *shape)
