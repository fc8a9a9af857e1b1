"""A flow as a density estimator of sbi, for its NPE and NLE: p(θ | x), or p(x | θ)."""

from collections.abc import Sequence

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from torch import Tensor

from rnode.dynamics import Probes
from rnode.flow import Flow
from rnode.models import mlp
from rnode.solver import Method, Solver


class Estimator(ConditionalDensityEstimator):
    """The density of standardized rows (B, d), given standardized conditions (B, k)."""

    net: Flow

    def __init__(self, net: Flow, rows: Tensor, conditions: Tensor, penalty: float):
        super().__init__(net, rows.shape[1:], conditions.shape[1:])
        self.penalty = penalty
        for name, values in (("rows", rows), ("conditions", conditions)):
            std, mean = torch.std_mean(values.flatten(1), dim=0)
            self.register_buffer(f"mean_of_{name}", mean)
            self.register_buffer(f"std_of_{name}", std.clamp(min=torch.finfo(std.dtype).tiny))

    def standardize(self, rows: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (…, *input_shape) and conditions (…, *condition_shape) → (…, d) and (…, k)."""
        y = rows.flatten(rows.dim() - len(self.input_shape))
        c = conditions.flatten(conditions.dim() - len(self.condition_shape))
        y = (y - self.mean_of_rows) / self.std_of_rows
        return y, (c - self.mean_of_conditions) / self.std_of_conditions

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        """input ((samples,) batch, *input_shape) → log p (samples, batch) in nats."""
        input = input[None] if input.dim() == 1 + len(self.input_shape) else input
        y, c = self.standardize(input, condition)
        return self.net.distribution(c).log_prob(y) - self.std_of_rows.log().sum()

    def loss(self, input: Tensor, condition: Tensor) -> Tensor:
        """−log p (batch,) in nats, in training mode with the penalties of equation (17)."""
        state, log_q, _ = self.net.solve(*self.standardize(input, condition))
        penalties = self.penalty * (state.E + state.n) if self.training else 0.0
        return -log_q - state.l + self.std_of_rows.log().sum() + penalties

    def sample(self, sample_shape: Sequence[int], condition: Tensor) -> Tensor:
        """Sample (*sample_shape, batch, *input_shape)."""
        c = self.standardize(condition.new_zeros(self.input_shape), condition)[1]
        y = self.net.distribution(c).sample(sample_shape) * self.std_of_rows + self.mean_of_rows
        return y.unflatten(-1, self.input_shape)


def build(theta: Tensor, x: Tensor, hidden: int = 64, penalty: float = 1e-3) -> Estimator:
    """A density estimator of theta (N, …) given x (N, …), for `NPE(density_estimator=build)`.

    NLE takes `lambda theta, x: build(x, theta)`. Both train a flow well by
    `train(learning_rate=4e-3)`.

    Args:
        theta: parameters, whose density is estimated.
        x: simulations, on which it is conditioned.
        hidden: width of the two inner layers of the field.
        penalty: λ_K and λ_J of equation (17), in training.
    """
    solver = Solver(Method("rk4", "radau", steps=4), Method("dopri5"))
    d, k = theta[0].numel(), x[0].numel()
    flow = mlp((d,), solver, Probes(), hidden, layers=3, k=k)
    return Estimator(flow, theta, x, penalty)
