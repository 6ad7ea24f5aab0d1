import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.config import DataConfig, MeshConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from dmax_jax.model.params import param_shardings
from dmax_jax.sharding import TRAIN, make_mesh
from dmax_jax.training.batch import Batch
from dmax_jax.training.objectives import objective_gradients
from dmax_jax.training.step import (
    accumulate,
    batch_sharding,
    expert_imbalance,
    init_state,
    make_train_step,
)
from tests.models import SMALL, small_params
from tests.training.batches import BLOCK, LENGTH, make_problem

RUN = RunConfig(
    data=DataConfig(task="stories", samples=8, sequence_length=LENGTH),
    model=SMALL,
    steps=6,
    batch_size=8,
    block_length=BLOCK,
    dtype="float32",
    deterministic=True,  # every backend must take the compiler's option
    objective=ObjectiveConfig(kind="oput", rollout="sample"),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.3, router_bias_rate=1e-2),
)


def make_batch(seed: int = 0, parts: int = 1, rows: int = 8) -> Batch:
    rng = np.random.default_rng(seed)
    batch = Batch(
        tokens_BT=rng.integers(0, 45, (rows, LENGTH)).astype(np.int32),
        prompt_length_B=rng.integers(0, LENGTH // 2, rows).astype(np.int32),
        index_B=np.arange(rows, dtype=np.int32),
        epoch_B=np.full(rows, seed, np.int32),
        on_policy_B=np.arange(rows) < rows // 2,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(parts, rows // parts, *leaf.shape[1:]), batch)


def train(mesh_config: MeshConfig, steps: int):
    """The metrics of every step and the last state."""
    mesh = make_mesh(mesh_config)
    step = make_train_step(RUN, SMALL, mesh)
    params = jax.device_put(jax.tree.map(jnp.copy, small_params()), param_shardings(SMALL, mesh, TRAIN))
    state = init_state(RUN, SMALL, mesh, params)  # takes the copies for itself
    metrics = []
    for seed in range(steps):
        state, row = step(state, jax.device_put(make_batch(seed), batch_sharding(mesh)))
        metrics.append(jax.device_get(row))
    assert step.func._cache_size() == 1  # compiled for the first state, and for no other
    return metrics, state


@pytest.fixture(scope="module")
def one_device():
    return train(MeshConfig(data=1), steps=5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_run_is_compiled_as_one(monkeypatch, deterministic):
    asked = []
    monkeypatch.setattr(jax, "jit", lambda function, **options: asked.append(options) or function)
    make_train_step(dataclasses.replace(RUN, deterministic=deterministic), SMALL, make_mesh(MeshConfig()))
    assert asked[-1]["compiler_options"].get("xla_gpu_deterministic_ops", False) == deterministic


def test_eight_devices_train_as_one_does(one_device):
    metrics, state = train(MeshConfig(data=4, expert=2), steps=5)
    assert len(state.params.layers[1].mlp.experts.up.devices()) == 8
    for found, expected in zip(metrics, one_device[0], strict=True):
        assert found.keys() == expected.keys()
        for name in ("loss", "masked_loss", "predicted_loss"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), state.params, one_device[1].params)


def test_a_step_moves_the_state(one_device):
    metrics, state = one_device
    assert state.step == 5
    assert state.opt_state[1][0].count == 5
    assert all(np.isfinite(value) for row in metrics for value in row.values())
    assert all(row["gradient_norm"] > 0 and row["expert_imbalance"] >= 1 for row in metrics)
    before, after = small_params(), state.params
    moved = {
        jax.tree_util.keystr(path): bool((old != new).any())
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    }
    assert all(moved.values()), moved
    # Nothing but the balancing moves the bias: five steps of 0.01 up, down or not at all.
    bias = np.asarray(after.layers[1].mlp.expert_bias) / 0.01
    np.testing.assert_allclose(bias, np.round(bias), atol=1e-4)
    assert np.abs(bias).max() <= 5.001


def test_parts_give_gradients_and_metrics_of_the_whole_batch():
    """The first two parts are on policy, the last two off policy, as the loader lays them out."""
    problem = make_problem(kind="oput", schedule="alternating")

    @jax.jit
    def run(params, batch):
        return accumulate(lambda part: objective_gradients(params, part, jax.random.key(0), problem), batch)

    whole, parts = run(small_params(), make_batch()), run(small_params(), make_batch(parts=4))
    for (path, expected), found in zip(
        jax.tree_util.tree_leaves_with_path(whole.grads), jax.tree.leaves(parts.grads), strict=True
    ):
        error = np.linalg.norm(found - expected)
        assert error <= 3e-6 * np.linalg.norm(expected), jax.tree_util.keystr(path)  # of sums in another order
    assert whole.metrics.keys() == parts.metrics.keys() >= {"loss", "masked_loss", "predicted_loss", "repaired"}
    for name in whole.metrics:
        np.testing.assert_allclose(parts.metrics[name].value, whole.metrics[name].value, rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, parts.loads, whole.loads)


def test_imbalance_is_the_largest_load_over_the_mean():
    loads = (jnp.array([1, 2, 3, 6]), jnp.array([4, 4, 4, 4]))
    np.testing.assert_allclose(expert_imbalance(loads), (2 + 1) / 2)
    assert expert_imbalance(()) == 0
