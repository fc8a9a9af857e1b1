import numpy as np
import pytest

from rnode.quadrature import radau, simpson


@pytest.mark.parametrize("nodes", range(1, 9))
def test_radau_starts_at_0_and_integrates_polynomials_of_degree_2n_minus_2(nodes):
    x, weights = radau(nodes)
    assert x.shape == weights.shape == (nodes,)
    assert x[0] == 0
    assert (np.diff(x) > 0).all()
    assert x[-1] < 1
    powers = np.arange(2 * nodes)
    error = np.abs(weights @ x[:, None] ** powers - 1 / (powers + 1))  # ∫₀¹ x^p = 1 / (p + 1)
    assert (error[:-1] < 1e-14).all()
    assert error[-1] > 1e-10


def test_simpson_has_equal_steps_and_the_weights_1_4_2_4_1():
    x, weights = simpson(4)
    np.testing.assert_allclose(x, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(weights * 12, [1, 4, 2, 4, 1])
