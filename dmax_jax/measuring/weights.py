"""Random weights of any size, made where they are used, and routing that spreads over all experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dmax_jax.config import ModelConfig
from dmax_jax.model.params import Params, ParamSpec, initial_value, param_shardings, param_specs
from dmax_jax.model.quantisation import quantise_weight
from dmax_jax.sharding import DECODE, Mesh


def random_params(
    key: jax.Array, config: ModelConfig, dtype: jnp.dtype, mesh: Mesh, *, kind: str | None = None
) -> Params:
    """`init_params` on the devices of a mesh, sharded as for decoding, one parameter after the other.

    With a `kind` of 8 bits every one is quantised before the next is made.
    """
    specs, tree = jax.tree.flatten(param_specs(config))
    shardings = jax.tree.leaves(param_shardings(config, mesh, DECODE))
    leaves = []
    for index, (spec, sharding) in enumerate(zip(specs, shardings, strict=True)):
        made = _make(jax.random.fold_in(key, index), spec, config.initializer_range, jnp.dtype(dtype), sharding)
        leaves.append(quantise_weight(made, kind, donate=True) if kind and spec.quantised else made)
    return jax.tree.unflatten(tree, leaves)


def _make(key: jax.Array, spec: ParamSpec, deviation: float, dtype: jnp.dtype, sharding: NamedSharding) -> jax.Array:
    return _compiled(dataclasses.replace(spec, axes=(), quantised=False), deviation, dtype, sharding)(key)


@functools.cache
def _compiled(spec: ParamSpec, deviation: float, dtype: jnp.dtype, sharding: NamedSharding):
    """One program for all parameters of a shape."""
    return jax.jit(lambda key: initial_value(key, spec, deviation, dtype), out_shardings=sharding)


def route_uniformly(params: Params, rows: int, key: jax.Array) -> Params:
    """Gives every one of `rows` rows a random bias of its own, which outweighs the router: any expert is as likely.

    Random weights alone send similar rows to the same experts, which makes a forward look cheaper than that of a
    trained model, whose experts are balanced.
    """

    def bias(index: int, layer):
        if not hasattr(layer.mlp, "expert_bias"):
            return layer
        shape = (rows, layer.mlp.expert_bias.shape[0])
        random_ME = jax.random.uniform(jax.random.fold_in(key, index), shape, maxval=1000.0)
        random_ME = jax.device_put(random_ME, layer.mlp.expert_bias.sharding)
        return layer.replace(mlp=layer.mlp.replace(expert_bias=random_ME))

    return params.replace(layers=tuple(bias(index, layer) for index, layer in enumerate(params.layers)))
