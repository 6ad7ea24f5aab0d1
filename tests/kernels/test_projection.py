import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels import projection
from dmax_jax.kernels.projection import parts_that_fit, plain_product, project_rows, streamed_product, suits
from dmax_jax.kernels.quantised_weight import KINDS, dequantise, project, quantise
from tests.kernels.interpreter import interpreted, needs_interpreter


def draw(rows: int, features: int, columns: int):
    rng = np.random.default_rng(rows)
    shapes = (rows, columns), (features, columns), (rows, features)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def assert_close(found, x, weight, residual):
    """Equal to the sums in float32, but for the rounding of the product and of the sum with the residual."""
    assert found.dtype == jnp.bfloat16
    exact = x.astype(jnp.float32) @ weight.T
    np.testing.assert_allclose(found.astype(jnp.float32), exact + residual, rtol=1e-2, atol=np.abs(exact).max() / 128)


@needs_interpreter
@pytest.mark.parametrize(("rows", "features", "parts"), [(1, 64, 1), (16, 128, 2), (32, 64, 4), (65, 64, 8)])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_kernel_equals_the_plain_function(rows, features, parts, kind):
    x, weight, residual = draw(rows, features, 128 * parts * 2)
    wide = weight.astype(jnp.float32)
    if kind:
        weight = quantise(weight, kind)
        wide = dequantise(weight)
    found = interpreted(functools.partial(streamed_product, parts=parts), x, weight, residual)
    assert_close(found, x, wide, residual.astype(jnp.float32))
    found = interpreted(functools.partial(streamed_product, dtype=jnp.float32, parts=parts), x, weight)
    np.testing.assert_allclose(found, x.astype(jnp.float32) @ wide.T, rtol=1e-5, atol=1e-3)  # not rounded


@needs_interpreter
def test_more_steps_than_stages(monkeypatch):
    monkeypatch.setattr(projection, "stages_that_fit", lambda *_, **__: 3)
    x, weight, residual = draw(8, 64, 128 * 14)
    streamed_product.clear_cache()
    found = interpreted(functools.partial(streamed_product, parts=2), x, weight, residual)
    streamed_product.clear_cache()
    assert_close(found, x, weight.astype(jnp.float32), residual.astype(jnp.float32))


def test_how_many_blocks_share_the_columns(monkeypatch):
    monkeypatch.setattr(projection, "multiprocessors", lambda: 132)
    assert parts_that_fit(32, 3072, 2048) == 2  # 96 blocks
    assert parts_that_fit(32, 2048, 2048) == 4
    assert parts_that_fit(64, 256, 2048) == 8
    assert parts_that_fit(16, 256, 2048) == 2  # 8 rows for each to join
    assert parts_that_fit(64, 256, 512) == 4  # a stage for each
    assert parts_that_fit(64, 64 * 132, 2048) == 1


@pytest.mark.parametrize("hopper", [False, True])
def test_which_products_the_kernel_makes(monkeypatch, hopper):
    seen = []
    monkeypatch.setattr(projection, "is_hopper", lambda: hopper)
    monkeypatch.setattr(projection, "multiprocessors", lambda: 132)
    monkeypatch.setattr(
        projection, "streamed_product", lambda *a, dtype: seen.append(dtype) or plain_product(*a, dtype=dtype)
    )

    x, weight, residual = draw(24, 64, 128)
    x, residual = x.reshape(2, 12, 128), residual.reshape(2, 12, 64)
    np.testing.assert_array_equal(project_rows(x, weight), project(x, weight))
    np.testing.assert_array_equal(project_rows(x, weight, residual), residual + project(x, weight))
    np.testing.assert_array_equal(project_rows(x, quantise(weight, "fp8")), project(x, quantise(weight, "fp8")))
    wide = project_rows(x, weight, dtype=jnp.float32)
    np.testing.assert_array_equal(wide, project(x.astype(jnp.float32), weight.astype(jnp.float32)))
    assert seen == [jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.float32][: 4 * hopper]
    for dtype, rows, shape in [
        ("float32", 24, (64, 128)),
        ("bfloat16", 129, (64, 128)),
        ("bfloat16", 24, (65, 128)),
        ("bfloat16", 24, (64, 64)),
        ("bfloat16", 24, (64 * 133, 128)),
    ]:
        assert not suits(jnp.dtype(dtype), rows, jax.ShapeDtypeStruct(shape, dtype))
