import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.residual_norm import add_and_norm, fused_add_and_norm, plain_add_and_norm
from dmax_jax.kernels.row_digits import in_digits
from tests.kernels.interpreter import interpreted, needs_interpreter

EPS = 1e-6


def draw(rows, parts, width=1024, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(3 * rng.normal(size=(rows, width)), jnp.bfloat16)
    parts = None if parts is None else jnp.asarray(rng.normal(size=(parts, rows, width)), jnp.float32)
    return x, parts, jnp.asarray(1 + rng.normal(size=width) / 4, jnp.bfloat16)


def test_parts_are_rounded_added_and_normalised():
    x, parts, weight = draw(3, 2)
    total, normal, digits = add_and_norm(x, parts, weight, EPS)
    added = x + (parts[0] + parts[1]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(total, added)
    added = np.asarray(added, np.float64)
    expected = added / np.sqrt((added**2).mean(axis=1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    assert np.linalg.norm(np.asarray(normal, np.float64) - expected) < 0.004 * np.linalg.norm(expected)
    assert digits is None
    same, again, digits = add_and_norm(total, None, weight, EPS, digits=True)
    assert same is total
    np.testing.assert_array_equal(again, normal)
    np.testing.assert_array_equal(digits.values, in_digits(normal).values)


@needs_interpreter
@pytest.mark.parametrize(("rows", "parts", "digits"), [(32, 8, False), (3, 1, True), (16, None, True)])
def test_the_kernel_equals_the_plain_function(rows, parts, digits):
    x, *others = draw(rows, parts)
    inputs = x.at[1].set(0), *others
    total, normal, found = interpreted(fused_add_and_norm, *inputs, eps=EPS, digits=digits)
    exact_total, exact, _ = plain_add_and_norm(*inputs, eps=EPS)
    for one, other in ((total, exact_total), (normal, exact)):
        assert one.dtype == jnp.bfloat16
        difference = jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32))
        assert difference.max() <= 1 / 16  # a step of bfloat16 for parts up to 16
        assert (difference > 0).mean() < 0.01  # as sums are made in another order
    assert (found is None) == (not digits)
    if digits:
        wanted = in_digits(normal)
        np.testing.assert_array_equal(found.values, wanted.values)
        np.testing.assert_array_equal(found.largest, wanted.largest)
