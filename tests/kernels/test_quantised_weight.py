import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.quantised_weight import (
    KINDS,
    dequantise,
    kind_of,
    project,
    project_groups,
    project_to_float32,
    quantise,
)

of_both_kinds = pytest.mark.parametrize("kind", KINDS)


def draw(*shape, seed=0) -> jax.Array:
    """Random numbers whose last axis is a channel of a size of its own."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 10 ** rng.uniform(-3, 2, (*shape[:-1], 1)), jnp.float32)


def steps(kind: str, values: np.ndarray) -> np.ndarray:
    """Distances of the kind's neighbouring values."""
    if kind == "int8":
        return np.ones_like(values)
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 2**-6))) - 3)


@of_both_kinds
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40)])
def test_rounding_moves_a_value_by_half_a_step_at_most(shape, dtype, kind):
    weight, outermost = draw(*shape).astype(dtype), {"int8": 127, "fp8": 448}[kind]
    found = quantise(weight, kind)
    assert (kind_of(found.dtype), found.dtype, found.scale.dtype) == (kind, KINDS[kind], jnp.float32)
    assert (found.shape, found.scale.shape) == (shape, shape[:-1])
    largest = np.abs(np.asarray(weight, np.float64)).max(-1)
    np.testing.assert_allclose(found.scale, largest / outermost, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(np.asarray(found.values, float)).max(-1), outermost)
    exact = np.asarray(weight, np.float64) / np.asarray(found.scale, np.float64)[..., None]
    error = np.abs(np.asarray(dequantise(found), np.float64) / np.asarray(found.scale)[..., None] - exact)
    assert (error <= steps(kind, exact) * (0.5 + 1e-4)).all()
    assert error.max() > 0.4 * steps(kind, exact).max()


@of_both_kinds
def test_a_channel_of_zeros_stays_zero(kind):
    found = quantise(jnp.asarray([[0.0, 0], [-3, 1]]), kind)
    values = {"int8": [-127, 42], "fp8": [-448, 144]}[kind]  # 42.3 and 149.3
    np.testing.assert_allclose(found.scale, [1, -3 / values[0]], rtol=1e-6)
    np.testing.assert_array_equal(found.values.astype(int), [[0, 0], values])
    np.testing.assert_allclose(dequantise(found), [[0, 0], [-3, -3 * values[1] / values[0]]], rtol=1e-6)


@of_both_kinds
def test_rounding_twice_changes_nothing(kind):
    once = quantise(draw(24, 40), kind)
    np.testing.assert_array_equal(quantise(dequantise(once), kind).values, once.values)


@of_both_kinds
@pytest.mark.parametrize("rows", [(40,), (5, 40), (2, 3, 40)])
def test_products_are_those_with_the_dequantised_weight(rows, kind):
    x, weight = draw(*rows, seed=1), quantise(draw(24, 40), kind)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantise(weight), np.float64).T
    for product in (project, project_to_float32):
        found = product(x, weight)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@of_both_kinds
def test_bfloat16_rounds_the_product_and_nothing_before(kind):
    x, weight = draw(64, 512, seed=1).astype(jnp.bfloat16), quantise(draw(24, 512), kind)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantise(weight), np.float64).T
    sizes = np.linalg.norm(np.asarray(x, float), axis=1)[:, None] * np.abs(dequantise(weight)).max(axis=1)[None]
    unrounded, rounded = project_to_float32(x, weight), project(x, weight)
    assert (np.abs(unrounded - exact) <= 1e-5 * sizes).all()
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, unrounded.astype(jnp.bfloat16))


@of_both_kinds
def test_grouped_products(kind):
    x, weight, sizes = draw(11, 40, seed=1), quantise(draw(4, 24, 40), kind), [3, 0, 7, 1]
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


@of_both_kinds
def test_a_loop_carries_8_bits(kind):
    """XLA would like to convert once, before the loop."""
    weight = quantise(draw(64, 64), kind)

    def loop(x, weight, steps):
        return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(project(x, weight)), x)

    compiled = jax.jit(loop).lower(jnp.ones((2, 64)), weight, 5).compile()
    (carried,) = [line for line in compiled.as_text().splitlines() if " while(" in line]
    assert f"{ {'int8': 's8', 'fp8': 'f8e4m3fn'}[kind] }[64,64]" in carried
    assert "f32[64,64]" not in carried.split(" while(")[0]
