import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.ranking import largest_pair_sum, ranks


@pytest.mark.parametrize("length", [1, 2, 8, 40])
def test_the_largest_come_first_and_of_equals_the_lower_index(length):
    x = np.random.default_rng(length).integers(0, 5, size=(200, length)).astype(np.float32)  # many ties
    x[0, :-1] = -np.inf
    order = np.argsort(-x, axis=1, kind="stable")
    np.testing.assert_array_equal(jax.jit(ranks)(jnp.asarray(x)), np.argsort(order, axis=1))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_pairs_are_of_two_entries_even_if_they_are_equal(length):
    x = np.random.default_rng(0).integers(-3, 3, size=(50, 4, length)).astype(np.float32)
    np.testing.assert_array_equal(largest_pair_sum(jnp.asarray(x)), np.sort(x, axis=-1)[:, :, -2:].sum(-1))
