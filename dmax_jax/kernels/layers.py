"""RMS norm, rotary embedding and the SwiGLU feed-forward."""

import jax
import jax.numpy as jnp

from dmax_jax.kernels.program import is_overlapping
from dmax_jax.kernels.projection import project_rows
from dmax_jax.kernels.quantised_weight import Weight, project


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis in float32, casts back, then scales by `weight`: the official code's order."""
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normal.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rotary_angles(positions_BT: jax.Array, rotary_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, R] in float32, R = rotary_dim / 2."""
    frequencies_R = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles_BTR = positions_BT[:, :, None].astype(jnp.float32) * frequencies_R[None, None, :]
    return jnp.cos(angles_BTR), jnp.sin(angles_BTR)


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates the first 2R dimensions of every head, half against half; the others pass through."""
    half = cos_BTR.shape[-1]
    cos, sin = (angle[:, :, None, :].astype(x_BTNH.dtype) for angle in (cos_BTR, sin_BTR))
    first, second, rest = jnp.split(x_BTNH, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def swiglu(x: jax.Array, gate_FD: Weight, up_FD: Weight, down_DF: Weight) -> jax.Array:
    return project(jax.nn.silu(project(x, gate_FD)) * project(x, up_FD), down_DF)


def feed_forward(x: jax.Array, gate_FD: Weight, up_FD: Weight, down_DF: Weight) -> jax.Array:
    """`swiglu`, by kernels where these start early; XLA's products are as fast where they don't."""
    if not is_overlapping():
        return swiglu(x, gate_FD, up_FD, down_DF)
    return project_rows(jax.nn.silu(project_rows(x, gate_FD)) * project_rows(x, up_FD), down_DF)
