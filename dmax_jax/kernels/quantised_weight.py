"""Weights in 8 bits with a scale per output channel, and the products of rows with weights of either kind."""

import jax
import jax.numpy as jnp
from flax import struct

KINDS = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
LARGEST = {KINDS["int8"]: 127, KINDS["fp8"]: 448}  # symmetric: -128 is never used


@struct.dataclass
class QuantisedWeight:
    """A weight [..., out, in] as `values` times `scale`."""

    values: jax.Array  # int8 or float8_e4m3fn [..., out, in]
    scale: jax.Array  # float32 [..., out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype


Weight = jax.Array | QuantisedWeight


def kind_of(dtype: jnp.dtype) -> str | None:
    """The kind with values of a dtype, None if there is none."""
    return next((kind for kind, of_values in KINDS.items() if of_values == dtype), None)


def quantise(weight: jax.Array, kind: str) -> QuantisedWeight:
    """Rounds to the nearest of the kind's values times a channel's scale; the largest of the channel is the outermost.

    Those of "int8" are the whole numbers up to 127; those of "fp8" have 4 significant bits, and below 2**-6 steps of
    2**-9.
    """
    weight = weight.astype(jnp.float32)
    dtype = KINDS[kind]
    scale = jnp.max(jnp.abs(weight), axis=-1) / LARGEST[dtype]
    scale = jnp.where(scale > 0, scale, 1)
    values = weight / scale[..., None]
    return QuantisedWeight((jnp.round(values) if kind == "int8" else values).astype(dtype), scale)


def dequantise(weight: QuantisedWeight, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return (weight.values.astype(jnp.float32) * weight.scale[..., None]).astype(dtype)


def project(x: jax.Array, weight: Weight) -> jax.Array:
    """[..., in] times weight [out, in] -> [..., out], in the dtype of `x`."""
    if isinstance(weight, QuantisedWeight):
        return project_to_float32(x, weight).astype(x.dtype)
    return x @ weight.T


def project_to_float32(x: jax.Array, weight: Weight) -> jax.Array:
    """`project` with its sums left in float32. The scale multiplies the sums, so that factors are exact in bfloat16."""
    x, factor = factors(x, weight) if isinstance(weight, QuantisedWeight) else (x, weight)
    out = jnp.einsum("...d,vd->...v", x, factor, preferred_element_type=jnp.float32)
    return out * _beside(weight.scale, out) if isinstance(weight, QuantisedWeight) else out


def project_groups(x_PD: jax.Array, weight_EFD: Weight, sizes_E: jax.Array) -> jax.Array:
    """`project` of the first `sizes_E[0]` rows with the first weight, and so on: [P, F]."""
    if not isinstance(weight_EFD, QuantisedWeight):
        return jax.lax.ragged_dot(x_PD, weight_EFD.swapaxes(1, 2), sizes_E)
    x_PD, values_EFD = factors(x_PD, weight_EFD)
    out_PF = jax.lax.ragged_dot(x_PD, values_EFD.swapaxes(1, 2), sizes_E, preferred_element_type=jnp.float32)
    scale_PF = jnp.repeat(weight_EFD.scale, sizes_E, axis=0, total_repeat_length=len(x_PD))
    return (out_PF * scale_PF).astype(x_PD.dtype)


def factors(x: jax.Array, weight: QuantisedWeight) -> tuple[jax.Array, jax.Array]:
    """`x` and the values in its dtype, for a product of them.

    XLA would convert the values once, before a loop, and carry that copy of the model through it, in 16 bits; so that
    it can't, they wait for `x`.
    """
    x, values = jax.lax.optimization_barrier((x, weight.values))
    return x, values.astype(x.dtype)


def _beside(scale: jax.Array, out: jax.Array) -> jax.Array:
    return scale.reshape((1,) * (out.ndim - 1) + scale.shape)
