"""The adjoint method on a fixed grid: gradients without a graph of the solver's steps.

Let a(t) be the gradient of the loss for z(t), and a_l, a_E and a_n its gradients for the integrals,
which are constant in time. The adjoint equations (Chen et al., 2018) are

    da/dt = −∂H/∂z  and  dg/dt = −∂H/∂θ,  where  H = aᵀf + a_l div f + a_E ‖f‖² + a_n ‖∇f‖².

They are solved together with (ODE), back from T, where g = 0, to 0, where g is the gradient for the
weights θ. Since g does not feed back into z and a, it is computed by quadrature if l, E and n are.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rnode.dynamics import Dynamics, State
from rnode.errors import require
from rnode.runge_kutta import path, step, time

Tensors = tuple[Tensor, ...]


class FixedGridAdjoint(torch.autograd.Function):
    """`integrate(z)`, with gradients for z and the `parameters` by the adjoint equations."""

    @staticmethod
    def forward(ctx, integrate: Callable, dynamics: Dynamics, method, precision, z, *parameters):
        state = integrate(z)
        ctx.solve = dynamics, method, precision
        ctx.save_for_backward(state.z, *parameters)
        return tuple(state)

    @staticmethod
    def backward(ctx, *gradients):
        refuse_second_derivatives()
        z, *parameters = ctx.saved_tensors
        dynamics, method, precision = ctx.solve
        system = AdjointSystem(dynamics, precision, tuple(parameters), gradients[1:])
        back = system.by_quadrature if method.weights else system.together
        return None, None, None, None, *back(z, gradients[0], method)


class AdjointSystem:
    """The adjoint equations of one solve."""

    def __init__(
        self,
        dynamics: Dynamics,
        precision: AbstractContextManager,
        parameters: Tensors,
        gradients: Tensors,
    ):
        self.dynamics, self.precision = dynamics, precision
        self.parameters, self.gradients = parameters, gradients  # those for l, E and n

    def slopes(self, t: Tensor, z: Tensor, a: Tensor, parameters: Tensors = ()) -> Tensors:
        """dz/dt, da/dt and, for the given parameters, dg/dt."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            with self.precision:
                rates = self.dynamics(t, State.initial(z))
            pairs = zip(rates, (a, *self.gradients), strict=True)
            hamiltonian = torch.stack([(rate * gradient).sum() for rate, gradient in pairs]).sum()
        inputs = (z, *parameters)
        gradients = torch.autograd.grad(hamiltonian, inputs, materialize_grads=True)
        return rates.z.detach(), *(-gradient for gradient in gradients)

    def together(self, z: Tensor, a: Tensor, method) -> Tensors:
        """z and a at T → a and g at 0, where g is solved together with z and a."""

        def f(t: Tensor, y: Tensors) -> Tensors:
            return self.slopes(t, *y[:2], self.parameters)

        y = (z, a, *map(torch.zeros_like, self.parameters))
        return path(f, y, method.times[::-1], method.method)[-1][1:]

    def by_quadrature(self, z: Tensor, a: Tensor, method) -> Tensors:
        """z and a at T → a and g at 0, where g is computed by the quadrature rule of l, E and n."""
        weights = dict(zip(method.times, method.weights, strict=False))  # T may be no node
        g = list(map(torch.zeros_like, self.parameters))

        def slopes_at(t: float) -> Tensors:
            """dz/dt and da/dt on the grid; if t is a node, its rate is added to g."""
            weight = weights.get(t)
            nodal = self.parameters if weight else ()
            dz, da, *rates = self.slopes(time(t, z), z, a, nodal)
            for total, rate in zip(g, rates, strict=False):
                total.sub_(rate, alpha=weight)
            return dz, da

        def f(t: Tensor, y: Tensors) -> Tensors:
            return self.slopes(t, y[0], y[1])

        for start, end in itertools.pairwise(method.times[::-1]):
            z, a = step(f, start, end - start, (z, a), method.method, slopes_at(start))
        slopes_at(0.0)
        return a, *g


def refuse_second_derivatives() -> None:
    wrong = "gradient=adjoint has no second derivatives: use backprop or checkpoint"
    require(not torch.is_grad_enabled(), wrong)
