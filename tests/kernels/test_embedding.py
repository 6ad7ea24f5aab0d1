import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels import embedding
from dmax_jax.kernels.embedding import lookup


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (3, 40)])
def test_rows_and_their_gradient(shape, small, monkeypatch):
    monkeypatch.setattr(embedding, "SMALL_TABLE", 10 if small else 9)
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(10, 4)).astype(np.float32), rng.integers(0, 3, shape)  # most rows are never read
    cotangent = rng.normal(size=(*shape, 4)).astype(np.float32)
    rows, pull_back = jax.vjp(lambda t: lookup(t, jnp.asarray(ids)), jnp.asarray(table))
    np.testing.assert_array_equal(rows, table[ids])
    expected = np.zeros_like(table, np.float64)
    np.add.at(expected, ids, cotangent)
    np.testing.assert_allclose(pull_back(jnp.asarray(cotangent))[0], expected, rtol=1e-5, atol=1e-5)


def test_a_constant_id_has_a_gradient_under_jit():
    found = jax.jit(jax.grad(lambda table: lookup(table, jnp.asarray(3)).sum()))(jnp.ones((5, 2)))
    assert found.tolist() == [[0, 0]] * 3 + [[1, 1], [0, 0]]
