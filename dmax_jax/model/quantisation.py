"""A model whose large matrices are in 8 bits: those whose ParamSpec says so. The others keep their dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.int8_weight import Int8Weight, dequantise, quantise
from dmax_jax.model.params import Params, ParamSpec, param_specs


def is_quantised(params: Params) -> bool:
    return isinstance(params.head, Int8Weight)


def quantise_params(params: Params, config: ModelConfig, *, donate: bool = False) -> Params:
    """The parameters in 8 bits, on the same devices; those that already are stay.

    One after the other: with `donate`, which deletes what was given, both forms of one alone stand in memory.
    """

    def convert(spec: ParamSpec, weight: jax.Array | Int8Weight) -> jax.Array | Int8Weight:
        return quantise_weight(weight, donate=donate) if spec.int8 and not isinstance(weight, Int8Weight) else weight

    return jax.tree.map(convert, param_specs(config), params)


def quantise_weight(weight: jax.Array, *, donate: bool = False) -> Int8Weight:
    """One weight in 8 bits, on the same devices."""
    quantised = jax.block_until_ready(_compiled_quantise(weight.sharding)(weight))
    if donate:
        weight.delete()  # no output of its size could take its place, so that jit would not
    return quantised


def dequantise_params(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters as arrays again; those in 8 bits get `dtype`."""

    def convert(weight: jax.Array | Int8Weight) -> jax.Array:
        if not isinstance(weight, Int8Weight):
            return weight
        return _compiled_dequantise(jnp.dtype(dtype), weight.values.sharding)(weight)

    return jax.tree.map(convert, params, is_leaf=_is_int8)


def int8_specs(config: ModelConfig) -> Params:
    """`param_specs` of the parameters in 8 bits."""

    def convert(spec: ParamSpec) -> ParamSpec | Int8Weight:
        if not spec.int8:
            return spec
        scale = ParamSpec(spec.shape[:-1], spec.axes[:-1], dtype="float32")
        return Int8Weight(dataclasses.replace(spec, dtype="int8", int8=False), scale)

    return jax.tree.map(convert, param_specs(config))


def int8_shardings(shardings: Params, config: ModelConfig) -> Params:
    """The shardings of parameters in 8 bits, from those of the parameters."""
    return jax.tree.map(
        lambda spec, sharding: int8_sharding(sharding) if spec.int8 else sharding, param_specs(config), shardings
    )


def int8_sharding(sharding: Sharding) -> Int8Weight:
    """Values lie as the weight does, and scales beside their channels."""
    if not isinstance(sharding, NamedSharding):
        return Int8Weight(sharding, sharding)
    return Int8Weight(sharding, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1])))


@functools.cache
def _compiled_quantise(sharding: Sharding):
    return jax.jit(quantise, out_shardings=int8_sharding(sharding))


@functools.cache
def _compiled_dequantise(dtype: jnp.dtype, sharding: Sharding):
    return jax.jit(functools.partial(dequantise, dtype=dtype), out_shardings=sharding)


def _is_int8(tree) -> bool:
    return isinstance(tree, Int8Weight)
