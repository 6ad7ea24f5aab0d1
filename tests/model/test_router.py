import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.model.router import route
from tests.models import small_model

WIDTH = 32


def expected_weights(x, router, bias, config) -> np.ndarray:
    """Row by row in float64; where scores tie, the lower index goes first."""
    size = config.num_experts // config.n_group
    weights = np.zeros((len(x), config.num_experts))
    for number, row in enumerate(np.asarray(x, np.float64)):
        score = 1 / (1 + np.exp(-np.asarray(router, np.float64) @ row))
        biased = score + np.asarray(bias, np.float64)
        groups = [list(range(first, first + size)) for first in range(0, config.num_experts, size)]
        groups.sort(key=lambda group: -sum(sorted(biased[group])[-2:]))  # a stable sort
        reachable = sorted(expert for group in groups[: config.topk_group] for expert in group)
        ids = sorted(reachable, key=lambda expert: -biased[expert])[: config.num_experts_per_tok]
        weights[number, ids] = score[ids] / score[ids].sum() * config.routed_scaling_factor
    return weights


def assert_routes(x, router, bias, config):
    weights = jax.jit(route, static_argnums=3)(x, router, bias, config).weights_ME
    np.testing.assert_allclose(weights, expected_weights(x, router, bias, config), rtol=1e-5)
    return weights


def chosen(weights) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in np.asarray(weights)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("experts", "chosen", "groups", "kept"),
    [(16, 4, 4, 2), (32, 8, 8, 4), (6, 2, 3, 2), (8, 3, 1, 1), (4, 2, 4, 3)],  # the last: groups of one expert
)
def test_choice_and_weights(experts, chosen, groups, kept, seed):
    config = small_model(num_experts=experts, num_experts_per_tok=chosen, n_group=groups, topk_group=kept)
    x, router, bias = (
        np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        for shape in [(40, WIDTH), (experts, WIDTH), (experts,)]
    )
    assert_routes(x, 0.2 * router, 0.1 * bias, config)


def test_the_best_expert_of_a_dropped_group_is_out_of_reach():
    config = small_model(num_experts=6, n_group=3, topk_group=1, num_experts_per_tok=2)
    scores = np.array([0.9, 0.1, 0.6, 0.6, 0.2, 0.1])  # two best: 1.0, 1.2 and 0.3
    router = np.zeros((6, WIDTH), np.float32)
    router[:, 0] = np.log(scores / (1 - scores))
    x = np.eye(1, WIDTH, dtype=np.float32)
    weights = assert_routes(x, router, np.zeros(6, np.float32), config)
    np.testing.assert_allclose(weights, [[0, 0, 1.25, 1.25, 0, 0]], rtol=1e-5)


def test_ties_go_to_the_lower_group_and_expert():
    config = small_model(num_experts=12, n_group=4, topk_group=2, num_experts_per_tok=4)
    router = np.zeros((12, WIDTH), np.float32)  # every score is one half
    weights = assert_routes(np.ones((3, WIDTH), np.float32), router, np.zeros(12, np.float32), config)
    assert chosen(weights) == [[0, 1, 2, 3]] * 3
    bias = np.array([0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0], np.float32)
    weights = assert_routes(np.ones((3, WIDTH), np.float32), router, bias, config)
    assert chosen(weights) == [[3, 5, 9, 10]] * 3


def test_the_bias_steers_the_choice_and_not_the_weights():
    config = small_model(num_experts=6, n_group=1, topk_group=1, num_experts_per_tok=2)
    router = jnp.zeros((6, WIDTH))
    weights = route(jnp.ones((1, WIDTH)), router, jnp.array([0.0, 0, 0, 0.7, 0, 0.1]), config).weights_ME
    assert weights.tolist() == [[0, 0, 0, 1.25, 0, 1.25]]


def test_rows_may_have_biases_of_their_own():
    config = small_model(num_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1)
    bias = jnp.array([[0.0, 0, 9, 0], [9.0, 0, 0, 0], [0, 0, 0, 9.0]])  # one more than rows
    choice = route(jnp.ones((2, WIDTH)), jnp.zeros((4, WIDTH)), bias, config)
    assert chosen(choice.weights_ME) == [[2], [0]]


def test_the_scores_are_float32_whatever_comes_in():
    config = small_model()
    x = jax.random.normal(jax.random.key(0), (64, WIDTH), jnp.bfloat16)
    router = jax.random.normal(jax.random.key(1), (6, WIDTH), jnp.bfloat16)
    bias = jnp.zeros(6)
    weights = route(x, router, bias, config).weights_ME
    wide_weights = route(x.astype(jnp.float32), router.astype(jnp.float32), bias, config).weights_ME
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, wide_weights)
