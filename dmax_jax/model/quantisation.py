"""A model whose large matrices are in 8 bits: those whose ParamSpec says so. The others keep their dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dmax_jax.config import ModelConfig
from dmax_jax.errors import InputError
from dmax_jax.kernels.quantised_weight import KINDS, QuantisedWeight, dequantise, kind_of, quantise
from dmax_jax.model.params import Params, ParamSpec, param_specs


def weights_kind(params: Params) -> str | None:
    """The kind of the weights in 8 bits, None if there are none."""
    return kind_of(params.head.dtype)


def in_kind(params: Params, config: ModelConfig, kind: str | None, *, donate: bool = False) -> Params:
    """The parameters with large matrices of a kind, on the same devices: one in 8 bits, "bf16" for none, None for any.

    With "bf16" all have the dtype of the embeddings. `donate` as in `quantise_params`. Raises InputError for weights in
    8 bits of another kind: they would be rounded twice.
    """
    if kind is None:
        return params
    if kind == "bf16":
        return dequantise_params(params, params.embed.dtype)
    found = weights_kind(params)
    if found is None:
        return quantise_params(params, config, kind, donate=donate)
    if found != kind:
        raise InputError(
            f"--weights={kind}: the checkpoint's weights are {found}, already rounded; give the model with 16 bits"
        )
    return params


def quantise_params(params: Params, config: ModelConfig, kind: str, *, donate: bool = False) -> Params:
    """The parameters, none of them in 8 bits yet, with the matrices in 8 bits of a kind, on the same devices.

    One after the other: with `donate`, which deletes what was given, both forms of one alone stand in memory.
    """

    def convert(spec: ParamSpec, weight: jax.Array) -> jax.Array | QuantisedWeight:
        return quantise_weight(weight, kind, donate=donate) if spec.quantised else weight

    return jax.tree.map(convert, param_specs(config), params)


def quantise_weight(weight: jax.Array, kind: str, *, donate: bool = False) -> QuantisedWeight:
    """One weight in 8 bits, on the same devices."""
    quantised = jax.block_until_ready(_compiled_quantise(kind, weight.sharding)(weight))
    if donate:
        weight.delete()  # no output of its size could take its place, so that jit would not
    return quantised


def dequantise_params(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters as arrays again; those in 8 bits get `dtype`."""

    def convert(weight: jax.Array | QuantisedWeight) -> jax.Array:
        if not isinstance(weight, QuantisedWeight):
            return weight
        return _compiled_dequantise(jnp.dtype(dtype), weight.values.sharding)(weight)

    return jax.tree.map(convert, params, is_leaf=_is_quantised)


def quantised_specs(config: ModelConfig, kind: str) -> Params:
    """`param_specs` of the parameters in 8 bits."""

    def convert(spec: ParamSpec) -> ParamSpec | QuantisedWeight:
        if not spec.quantised:
            return spec
        values = dataclasses.replace(spec, dtype=KINDS[kind].name, quantised=False)
        return QuantisedWeight(values, ParamSpec(spec.shape[:-1], spec.axes[:-1], dtype="float32"))

    return jax.tree.map(convert, param_specs(config))


def quantised_shardings(shardings: Params, config: ModelConfig) -> Params:
    """The shardings of parameters in 8 bits, from those of the parameters."""
    return jax.tree.map(
        lambda spec, sharding: quantised_sharding(sharding) if spec.quantised else sharding,
        param_specs(config),
        shardings,
    )


def quantised_sharding(sharding: Sharding) -> QuantisedWeight:
    """Values lie as the weight does, and scales beside their channels."""
    if not isinstance(sharding, NamedSharding):
        return QuantisedWeight(sharding, sharding)
    return QuantisedWeight(sharding, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1])))


@functools.cache
def _compiled_quantise(kind: str, sharding: Sharding):
    return jax.jit(functools.partial(quantise, kind=kind), out_shardings=quantised_sharding(sharding))


@functools.cache
def _compiled_dequantise(dtype: jnp.dtype, sharding: Sharding):
    return jax.jit(functools.partial(dequantise, dtype=dtype), out_shardings=sharding)


def _is_quantised(tree) -> bool:
    return isinstance(tree, QuantisedWeight)
