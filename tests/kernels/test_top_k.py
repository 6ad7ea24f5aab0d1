import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.top_k import SHORT, top_k_ids


@pytest.mark.parametrize("length", [1, 2, 8, SHORT, SHORT + 1, 40])
def test_the_largest_come_first_and_of_equals_the_lower_index(length):
    x = np.random.default_rng(length).integers(0, 5, size=(200, length)).astype(np.float32)  # many ties
    x[0, :-1] = -np.inf
    for k in {1, min(4, length), length}:
        expected = np.argsort(-x, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(jax.jit(top_k_ids, static_argnums=1)(jnp.asarray(x), k), expected)
