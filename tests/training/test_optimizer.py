import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmax_jax.config import MeshConfig, OptimizerConfig
from dmax_jax.model.params import param_shardings
from dmax_jax.sharding import TRAIN, make_mesh
from dmax_jax.training.optimizer import balance_experts, learning_rate, make_optimizer, optimizer_shardings
from tests.models import SMALL, small_params

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.1, weight_decay=0.3, clip_norm=1.0)


def by_name(tree) -> dict:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def params():
    """With an expert bias that a decay would change."""
    params = small_params()
    sparse = params.layers[1]
    bias = jnp.arange(6.0)
    return params.replace(layers=(params.layers[0], sparse.replace(mlp=sparse.mlp.replace(expert_bias=bias))))


def test_warm_up_and_cosine():
    schedule = learning_rate(CONFIG, 200)
    assert schedule(0) == 0
    np.testing.assert_allclose([schedule(5), schedule(10), schedule(20)], [2.5e-3, 5e-3, 1e-2], rtol=1e-6)
    for step in (21, 65, 110, 155, 199):
        expected = 1e-2 * (1 + math.cos(math.pi * (step - 20) / 180)) / 2
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-4)
    assert schedule(200) == schedule(300) == 0


@pytest.mark.parametrize(("warmup", "steps", "first"), [(0.0, 10, 1e-2), (1.0, 10, 0.0), (0.03, 1, 1e-2)])
def test_extreme_schedules(warmup, steps, first):
    schedule = learning_rate(dataclasses.replace(CONFIG, warmup_ratio=warmup), steps)
    np.testing.assert_allclose(schedule(0), first)
    assert all(0 <= schedule(step) <= 1e-2 for step in range(steps + 1))


def adamw_by_hand(params: dict, grads_of_steps: list[dict], config, steps):
    """Clipping, AdamW and the schedule in float64; yields the parameters after every step."""
    first = {name: np.zeros(value.shape) for name, value in params.items()}
    second, schedule = dict(first), learning_rate(config, steps)
    for step, grads in enumerate(grads_of_steps, start=1):
        norm = np.sqrt(sum((gradient**2).sum() for gradient in grads.values()))
        updated = {}
        for name, value in params.items():
            gradient = grads[name] * min(1, config.clip_norm / norm)
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient**2
            mean, square = first[name] / (1 - config.beta1**step), second[name] / (1 - config.beta2**step)
            decay = 0 if "norm" in name or "expert_bias" in name else config.weight_decay * value
            updated[name] = value - float(schedule(step - 1)) * (mean / (np.sqrt(square) + 1e-8) + decay)
        params = updated
        yield params


def test_three_steps_by_hand(params):
    """One gradient that is clipped and two that are not; norms and the expert bias do not decay."""
    config = dataclasses.replace(CONFIG, warmup_ratio=0.0)
    optimizer = make_optimizer(config, 5, SMALL)
    rng = np.random.default_rng(0)
    noise = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params) for _ in range(3)]
    grads = [
        jax.tree.map(lambda leaf, size=size: (size * leaf).astype(np.float32), tree)
        for tree, size in zip(noise, (1.0, 1e-4, 1e-3), strict=True)
    ]

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected = adamw_by_hand(by_name(params), [by_name(tree) for tree in grads], config, 5)
    found, state = params, jax.jit(optimizer.init)(params)
    for tree, values in zip(grads, expected, strict=True):
        found, state = step(found, state, tree)
        for name, value in by_name(found).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_moments_lie_where_their_parameters_lie(params):
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    optimizer = make_optimizer(CONFIG, 10, SMALL)
    shardings = optimizer_shardings(optimizer, SMALL, mesh, params)
    state = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    expected = jax.tree.leaves(param_shardings(SMALL, mesh, TRAIN))
    adam = shardings[1][0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == expected
    assert adam.count.is_fully_replicated


def test_busy_experts_get_a_lower_bias_and_idle_ones_a_higher_one(params):
    load = jnp.array([4, 4, 10, 0, 3, 3])  # mean 4
    balanced = balance_experts(params, (load,), 0.01)
    expected = np.arange(6.0) + np.array([0, 0, -0.01, 0.01, 0.01, 0.01])
    np.testing.assert_allclose(balanced.layers[1].mlp.expert_bias, expected, rtol=1e-6)
    untouched = balanced.layers[1].mlp.replace(expert_bias=params.layers[1].mlp.expert_bias)
    layers = (balanced.layers[0], balanced.layers[1].replace(mlp=untouched))
    jax.tree.map(np.testing.assert_array_equal, balanced.replace(layers=layers), params)
