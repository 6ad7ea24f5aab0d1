import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.int8_weight import dequantise, project, project_groups, project_to_float32, quantise


def draw(*shape, seed=0) -> jax.Array:
    """Random numbers whose last axis is a channel of a size of its own."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 10 ** rng.uniform(-3, 2, (*shape[:-1], 1)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40)])
def test_rounding_moves_a_value_by_half_a_step_at_most(shape, dtype):
    weight = draw(*shape).astype(dtype)
    found = quantise(weight)
    assert (found.values.dtype, found.scale.dtype) == (jnp.int8, jnp.float32)
    assert (found.shape, found.scale.shape) == (shape, shape[:-1])
    largest = np.abs(np.asarray(weight, np.float64)).max(-1)
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(np.asarray(found.values, int)).max(-1), 127)
    error = np.abs(np.asarray(dequantise(found), np.float64) - np.asarray(weight, np.float64))
    assert (error <= largest[..., None] / 127 * (0.5 + 1e-4)).all()
    assert error.max() > 0.4 * largest.max() / 127


def test_a_channel_of_zeros_stays_zero():
    found = quantise(jnp.asarray([[0.0, 0], [-3, 1]]))
    np.testing.assert_allclose(found.scale, [1, 3 / 127], rtol=1e-6)
    np.testing.assert_array_equal(found.values, [[0, 0], [-127, 42]])
    np.testing.assert_allclose(dequantise(found), [[0, 0], [-3, 126 / 127]], rtol=1e-6)


def test_rounding_twice_changes_nothing():
    once = quantise(draw(24, 40))
    np.testing.assert_array_equal(quantise(dequantise(once)).values, once.values)


@pytest.mark.parametrize("rows", [(40,), (5, 40), (2, 3, 40)])
def test_products_are_those_with_the_dequantised_weight(rows):
    x, weight = draw(*rows, seed=1), quantise(draw(24, 40))
    expected = np.asarray(x, np.float64) @ np.asarray(dequantise(weight), np.float64).T
    for product in (project, project_to_float32):
        found = product(x, weight)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_rounds_the_product_and_nothing_before():
    x, weight = draw(64, 512, seed=1).astype(jnp.bfloat16), quantise(draw(24, 512))
    exact = np.asarray(x, np.float64) @ np.asarray(dequantise(weight), np.float64).T
    sizes = np.linalg.norm(np.asarray(x, float), axis=1)[:, None] * np.asarray(weight.scale)[None] * 127
    unrounded, rounded = project_to_float32(x, weight), project(x, weight)
    assert (np.abs(unrounded - exact) <= 1e-5 * sizes).all()
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, unrounded.astype(jnp.bfloat16))


def test_grouped_products():
    x, weight, sizes = draw(11, 40, seed=1), quantise(draw(4, 24, 40)), [3, 0, 7, 1]
    whose = np.repeat(np.arange(4), sizes)
    expected = np.einsum("pd,pfd->pf", np.asarray(x, np.float64), np.asarray(dequantise(weight), np.float64)[whose])
    found = project_groups(x, weight, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_plain_weight_is_multiplied_as_ever():
    """Trained models and golden values stand on these very programs."""

    def program(function, *arguments) -> str:
        return str(jax.make_jaxpr(function)(*arguments))

    x, weight = draw(2, 5, 40), draw(24, 40)
    assert program(project, x, weight) == program(lambda x, w: x @ w.T, x, weight)
    head = program(lambda x, w: jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32), x, weight)
    assert program(project_to_float32, x, weight) == head


def test_a_loop_carries_8_bits():
    """XLA would like to convert once, before the loop."""
    weight = quantise(draw(64, 64))

    def loop(x, weight, steps):
        return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(project(x, weight)), x)

    compiled = jax.jit(loop).lower(jnp.ones((2, 64)), weight, 5).compile()
    (carried,) = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert "s8[64,64]" in carried
    assert "f32[64,64]" not in carried.split(" while(")[0]
