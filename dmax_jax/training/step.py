"""One optimiser step as one jitted, donated function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from dmax_jax.config import ModelConfig, RunConfig
from dmax_jax.determinism import compiler_options
from dmax_jax.model.params import Params, init_params, param_shardings
from dmax_jax.sharding import TRAIN, named_sharding
from dmax_jax.training.batch import Batch
from dmax_jax.training.losses import Problem
from dmax_jax.training.objectives import Gradients, objective_gradients
from dmax_jax.training.optimizer import balance_experts, make_optimizer, optimizer_shardings

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    step: jax.Array  # optimiser steps done
    params: Params  # float32 master weights
    opt_state: optax.OptState


def state_shardings(run: RunConfig, model: ModelConfig, mesh: Mesh) -> TrainState:
    """The state's tree with a NamedSharding at every leaf."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    optimizer = make_optimizer(run.optimizer, run.steps, model)
    return TrainState(
        step=named_sharding(mesh, TRAIN),
        params=param_shardings(model, mesh, TRAIN),
        opt_state=optimizer_shardings(optimizer, model, mesh, params),
    )


def init_state(run: RunConfig, model: ModelConfig, mesh: Mesh, params: Params | None = None) -> TrainState:
    """A state at step 0 with the given float32 weights (donated), or with random ones from the run's seed."""
    optimizer = make_optimizer(run.optimizer, run.steps, model)

    def build(params: Params | None) -> TrainState:
        params = init_params(jax.random.key(run.seed), model) if params is None else params
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    return jax.jit(build, out_shardings=state_shardings(run, model, mesh), donate_argnums=0)(params)


def make_train_step(
    run: RunConfig, model: ModelConfig, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the step; its batch has a leading axis of `run.accumulation` parts, which are worked through in turn."""
    optimizer = make_optimizer(run.optimizer, run.steps, model)
    problem = Problem(model, run.objective, run.block_length, run.dtype)
    key = jax.random.key(run.seed)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        total = accumulate(lambda part: objective_gradients(state.params, part, key, problem), batch)
        updates, opt_state = optimizer.update(total.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if run.optimizer.router_bias_rate:
            params = balance_experts(params, total.loads, run.optimizer.router_bias_rate)
        metrics = {name: mean.value for name, mean in total.metrics.items()} | {
            "gradient_norm": optax.tree.norm(total.grads),
            "expert_imbalance": expert_imbalance(total.loads),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = state_shardings(run, model, mesh)
    options = compiler_options(run.deterministic)
    step = jax.jit(train_step, donate_argnames="state", out_shardings=(shardings, None), compiler_options=options)
    return functools.partial(step, key=key)  # an argument, so that another seed is the same program


def accumulate(gradients: Callable[[Batch], Gradients], batch: Batch) -> Gradients:
    """Gradients, metrics and loads of all parts along the batch's leading axis, with one part in memory at a time."""
    parts = batch.tokens_BT.shape[0]
    if parts == 1:
        return gradients(jax.tree.map(lambda leaf: leaf[0], batch))

    def add(total: Gradients, part: Batch) -> tuple[Gradients, None]:
        return jax.tree.map(jnp.add, total, gradients(part)), None

    shapes = jax.eval_shape(gradients, jax.tree.map(lambda leaf: leaf[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, batch)
    return total.replace(grads=jax.tree.map(lambda leaf: leaf / parts, total.grads))


def expert_imbalance(loads: tuple[jax.Array, ...]) -> jax.Array:
    """The largest load of an expert over the mean load, averaged over layers; 1 is perfect balance, 0 no experts."""
    if not loads:
        return jnp.float32(0)
    return jnp.mean(jnp.stack([jnp.max(load_E) / jnp.mean(load_E) for load_E in loads]))


def batch_sharding(mesh: Mesh):
    """Rows over the data and expert axes; the leading axis of parts is whole everywhere."""
    return named_sharding(mesh, TRAIN, None, "batch")
