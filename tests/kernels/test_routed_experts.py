import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.routed_experts import DENSE_EXPERTS, dense_experts, ragged_experts, routed_experts

IMPLEMENTATIONS = [dense_experts, ragged_experts]

# rows M, width D, feed-forward F, experts E, chosen X
SIZES = [(1, 8, 6, 4, 1), (17, 16, 12, 8, 2), (40, 12, 20, 24, 6)]


def draw(seed: int, M: int, D: int, F: int, E: int, X: int, among: list[int] | None = None):
    """Random inputs; the ids of a row are distinct and `among` the given experts (default: all)."""
    rng = np.random.default_rng(seed)
    x, gate, up, down = (rng.normal(size=shape) for shape in [(M, D), (E, F, D), (E, F, D), (E, D, F)])
    among = list(range(E)) if among is None else among
    ids = np.array([rng.choice(among, X, replace=False) for _ in range(M)], np.int32)
    weights = rng.uniform(0.1, 2, size=(M, X))
    return x, gate / D**0.5, up / D**0.5, down / F**0.5, ids, weights


def expected_output(x, gate, up, down, ids, weights) -> np.ndarray:
    """One expert and one row at a time, in float64."""
    out = np.zeros_like(x)
    for row, experts in enumerate(ids):
        for expert, weight in zip(experts, weights[row], strict=True):
            hidden = gate[expert] @ x[row]
            out[row] += weight * down[expert] @ (hidden / (1 + np.exp(-hidden)) * (up[expert] @ x[row]))
    return out


def expected_gradients(x, gate, up, down, ids, weights, out_gradient):
    """Of sum(output * out_gradient) with respect to x, gate, up, down and weights, by the chain rule on paper."""
    dx, dgate, dup, ddown, dweights = (np.zeros_like(array) for array in (x, gate, up, down, weights))
    for row, experts in enumerate(ids):
        for slot, expert in enumerate(experts):
            g, u = gate[expert] @ x[row], up[expert] @ x[row]
            sigmoid = 1 / (1 + np.exp(-g))
            hidden = g * sigmoid * u
            dweights[row, slot] = out_gradient[row] @ down[expert] @ hidden
            scaled = weights[row, slot] * out_gradient[row]
            ddown[expert] += np.outer(scaled, hidden)
            dhidden = scaled @ down[expert]
            dg = dhidden * u * sigmoid * (1 + g * (1 - sigmoid))
            du = dhidden * g * sigmoid
            dgate[expert] += np.outer(dg, x[row])
            dup[expert] += np.outer(du, x[row])
            dx[row] += gate[expert].T @ dg + up[expert].T @ du
    return dx, dgate, dup, ddown, dweights


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, x, gate, up, down, ids, weights, out_gradient):
    out, pull_back = jax.vjp(lambda x, g, u, d, w: implementation(x, g, u, d, ids, w), x, gate, up, down, weights)
    return out, pull_back(out_gradient)


def check(implementation, inputs):
    out_gradient = np.random.default_rng(7).normal(size=inputs[0].shape)
    out, gradients = run(implementation, *map(single, inputs), single(out_gradient))
    close(out, expected_output(*inputs), 1e-5)
    for found, expected in zip(gradients, expected_gradients(*inputs, out_gradient), strict=True):
        close(found, expected, 1e-5)


def single(array):
    return array if array.dtype == np.int32 else jnp.asarray(array, jnp.float32)


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, size, seed):
    check(implementation, draw(seed, *size))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_rows(implementation):
    check(implementation, draw(2, 17, 16, 12, 8, 2, among=[1, 4, 6]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_one_expert_with_all_rows(implementation, expert):
    check(implementation, draw(3, 20, 8, 6, 8, 1, among=[expert]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_row_with_all_experts(implementation):
    check(implementation, draw(4, 9, 8, 6, 5, 5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_products(implementation):
    inputs = draw(5, 40, 16, 24, 8, 2)
    x, gate, up, down = (jnp.asarray(array, jnp.bfloat16) for array in inputs[:4])
    out = jax.jit(implementation)(x, gate, up, down, inputs[4], jnp.asarray(inputs[5], jnp.float32))
    assert out.dtype == jnp.bfloat16
    close(np.asarray(out, np.float64), expected_output(*inputs), 0.02)


@pytest.mark.parametrize("experts", [DENSE_EXPERTS, DENSE_EXPERTS + 1])
def test_the_choice_of_an_implementation_changes_no_value(experts):
    inputs = draw(6, 11, 8, 6, experts, 2)
    close(jax.jit(routed_experts)(*map(single, inputs)), expected_output(*inputs), 1e-5)
