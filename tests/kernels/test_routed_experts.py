import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels import routed_experts as module
from dmax_jax.kernels.expert_choice import choice_of
from dmax_jax.kernels.quantised_weight import KINDS, dequantise, quantise
from dmax_jax.kernels.routed_experts import (
    DENSE_EXPERTS,
    dense_experts,
    looped_experts,
    ragged_experts,
    routed_experts,
)

# rows M, width D, feed-forward F, experts E, chosen X
SIZES = [(1, 8, 6, 4, 1), (17, 16, 12, 8, 2), (40, 12, 20, 24, 6)]
SHARED_WIDTH = 10


def by_all(x, choice, experts, shared, *, experts_per_row):
    return dense_experts(x, choice, experts, shared)


def summed(*inputs, experts_per_row):
    return routed_experts(*inputs, experts_per_row=experts_per_row).sum(axis=0)


IMPLEMENTATIONS = [by_all, ragged_experts]


def draw(seed: int, M: int, D: int, F: int, E: int, X: int, among: list[int] | None = None, shared_width=SHARED_WIDTH):
    """Random rows, weights, experts and shared expert; a row chooses X `among` the given experts (default: all)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(M, D))
    experts = [rng.normal(size=shape) / shape[-1] ** 0.5 for shape in [(E, F, D), (E, F, D), (E, D, F)]]
    S = shared_width
    shared = [rng.normal(size=shape) / shape[-1] ** 0.5 for shape in [(S, D), (S, D), (D, S)]]
    weights = np.zeros((M, E))
    for row in range(M):
        weights[row, rng.choice(list(range(E)) if among is None else among, X, replace=False)] = rng.uniform(0.1, 2, X)
    return x, weights, experts, shared


def expert_and_gradients(x, matrices, scale):
    """One expert on one row: its output, and what a gradient of `scale` times the output makes of x and matrices."""
    gate, up, down = matrices
    g, u = gate @ x, up @ x
    sigmoid = 1 / (1 + np.exp(-g))
    hidden = g * sigmoid * u

    def pull_back(out_gradient):
        dhidden = scale * out_gradient @ down
        dg = dhidden * u * sigmoid * (1 + g * (1 - sigmoid))
        du = dhidden * g * sigmoid
        return gate.T @ dg + up.T @ du, np.outer(dg, x), np.outer(du, x), np.outer(scale * out_gradient, hidden)

    return down @ hidden, pull_back


def expected(x, weights, experts, shared, out_gradient):
    """Output and gradients, one row and one expert at a time in float64, by the chain rule on paper."""
    out = np.zeros_like(x)
    gradients = jax.tree.map(np.zeros_like, (x, weights, list(experts), list(shared)))
    dx, dweights, dexperts, dshared = gradients
    for row in range(len(x)):
        for expert in [*np.flatnonzero(weights[row]), -1]:
            matrices = shared if expert == -1 else [array[expert] for array in experts]
            weight = 1 if expert == -1 else weights[row, expert]
            value, pull_back = expert_and_gradients(x[row], matrices, weight)
            out[row] += weight * value
            own_dx, *own = pull_back(out_gradient[row])
            dx[row] += own_dx
            for total, part in zip(
                dshared if expert == -1 else [array[expert] for array in dexperts], own, strict=True
            ):
                total += part
            if expert != -1:
                dweights[row, expert] = out_gradient[row] @ value
    return out, gradients


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(implementation, experts_per_row, x, weights, experts, shared, out_gradient):
    def apply(x, weights, experts, shared):
        return implementation(x, choice_of(weights), experts, shared, experts_per_row=experts_per_row)

    out, pull_back = jax.vjp(apply, x, weights, experts, shared)
    return out, pull_back(out_gradient)


def check(implementation, inputs, experts_per_row):
    out_gradient = np.random.default_rng(7).normal(size=inputs[0].shape)
    arguments = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), (*inputs, out_gradient))
    out, gradients = run(implementation, experts_per_row, *arguments)
    wanted, wanted_gradients = expected(*inputs, out_gradient)
    close(out, wanted, 1e-5)
    chosen = inputs[1] != 0  # the gradients of other weights are of no use to a router
    gradients = (gradients[0], np.where(chosen, gradients[1], 0), *gradients[2:])
    jax.tree.map(lambda found, want: close(found, want, 1e-5), gradients, wanted_gradients)


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, size, seed):
    check(implementation, draw(seed, *size), size[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_rows(implementation):
    check(implementation, draw(2, 17, 16, 12, 8, 2, among=[1, 4, 6]), 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("expert", [0, 3, 7])
def test_one_expert_with_all_rows(implementation, expert):
    check(implementation, draw(3, 20, 8, 6, 8, 1, among=[expert]), 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_row_with_all_experts(implementation):
    check(implementation, draw(4, 9, 8, 6, 5, 5), 5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_without_experts_has_the_shared_one(implementation):
    x, weights, experts, shared = draw(5, 6, 8, 6, 5, 2)
    weights[2] = 0
    check(implementation, (x, weights, experts, shared), 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_products(implementation):
    inputs = draw(5, 40, 16, 24, 8, 2)
    x, experts, shared = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), (inputs[0], *inputs[2:]))
    choice = choice_of(jnp.asarray(inputs[1], jnp.float32))
    out = jax.jit(implementation, static_argnames="experts_per_row")(x, choice, experts, shared, experts_per_row=2)
    assert out.dtype == jnp.bfloat16
    close(np.asarray(out, np.float64), expected(*inputs, inputs[0])[0], 0.02)


@pytest.mark.parametrize("experts", [DENSE_EXPERTS, DENSE_EXPERTS + 1])
def test_the_choice_of_an_implementation_changes_no_value(experts):
    check(summed, draw(6, 11, 8, 6, experts, 2), 2)


def test_a_hopper_gpu_runs_the_kernels_and_differentiates_the_plain_function(monkeypatch):
    inputs = draw(7, 11, 8, 6, 12, 2)
    seen = []

    def stand_in(x, choice, experts, shared):
        seen.append(x.shape)
        whole = ragged_experts(x, choice, experts, shared, experts_per_row=2)
        return jnp.stack([3 * whole, -2 * whole])

    monkeypatch.setattr(module, "is_hopper", lambda: True)
    monkeypatch.setattr(module, "can_stream", lambda x, experts, shared: True)
    monkeypatch.setattr(module, "streamed_experts", stand_in)
    check(functools.partial(summed), inputs, 2)  # a function of its own, which jit has not seen before
    assert seen


def by_loop(x, choice, experts, shared, *, experts_per_row):
    return looped_experts(x, choice, experts, shared)


def run_quantised(implementation, inputs, experts_per_row, kind, dtype=jnp.float32):
    """What it makes of 8-bit experts, and what the dequantised ones would in float64."""
    x, weights, *matrices = inputs
    x = jnp.asarray(x, dtype)
    quantised = jax.tree.map(lambda matrix: quantise(jnp.asarray(matrix), kind), matrices)
    arguments = x, choice_of(jnp.asarray(weights, jnp.float32)), *quantised
    out = jax.jit(functools.partial(implementation, experts_per_row=experts_per_row))(*arguments)
    plain = [[np.asarray(dequantise(matrix), np.float64) for matrix in group] for group in quantised]
    return out, expected(np.asarray(x, np.float64), weights, *plain, np.zeros(x.shape))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, by_loop])
def test_8_bit_experts(implementation, size, kind):
    close(*run_quantised(implementation, draw(0, *size), size[-1], kind), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, by_loop])
def test_8_bit_experts_without_rows_and_rows_without_experts(implementation, kind):
    x, weights, experts, shared = draw(2, 17, 16, 12, 8, 2, among=[1, 4, 6])
    weights[3] = 0
    close(*run_quantised(implementation, (x, weights, experts, shared), 2, kind), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, by_loop])
def test_8_bit_experts_of_bfloat16_rows(implementation, kind):
    out, wanted = run_quantised(implementation, draw(2, 17, 16, 12, 8, 2), 2, kind, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    close(np.asarray(out, np.float64), wanted, 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "experts", "hopper", "chosen"),
    [
        (11, DENSE_EXPERTS, False, "dense"),
        (128, 12, False, "looped"),
        (129, 12, False, "ragged"),
        (11, DENSE_EXPERTS, True, "dense"),
        (64, 12, True, "streamed"),
        (65, 12, True, "grouped"),
    ],
)
def test_what_runs_8_bit_experts(rows, experts, hopper, chosen, kind, monkeypatch):
    monkeypatch.setattr(module, "is_hopper", lambda: hopper)
    for name in ("dense", "looped", "ragged", "streamed", "grouped"):
        monkeypatch.setattr(module, f"{name}_experts", lambda *inputs, name=name, **rest: np.array(name))
    monkeypatch.setattr(module, "differentiated_as", lambda plain: lambda function: function)
    x, weights, *matrices = draw(7, rows, 128, 128, experts, 2, shared_width=128)
    quantised = [[quantise(jnp.asarray(matrix), kind) for matrix in group] for group in matrices]
    choice = choice_of(jnp.asarray(weights, jnp.float32))
    assert chosen in str(routed_experts(jnp.asarray(x, jnp.bfloat16), choice, *quantised, experts_per_row=2))
