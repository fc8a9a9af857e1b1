import math

import torch

from rnode import State, bits_per_dim, objective


def test_equation_17_by_hand():
    """Two samples in two dimensions, every term worked out on paper."""
    state = State(
        z=torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64),
        l=torch.tensor([0.5, -0.25], dtype=torch.float64),
        E=torch.tensor([3.0, 1.0], dtype=torch.float64),
        n=torch.tensor([4.0, 8.0], dtype=torch.float64),
    )
    # ‖z‖²/2 is 2.5 and 0.5, −l is −0.5 and 0.25, 0.1 E is 0.3 and 0.1, 0.01 n is 0.04 and 0.08;
    # −log q adds log 2π to each sample.
    total = (2.5 - 0.5 + 0.3 + 0.04) + (0.5 + 0.25 + 0.1 + 0.08) + 2 * math.log(2 * math.pi)
    loss = objective(state, lambda_k=0.1, lambda_j=0.01)
    assert math.isclose(loss, total / (2 * 2), rel_tol=1e-12)


def test_bits_per_dim_are_nats_over_d_log_2():
    bits = bits_per_dim(torch.tensor([-6.0]), torch.tensor([2.0]), d=4)
    torch.testing.assert_close(bits, torch.tensor([4 / (4 * math.log(2))]))
