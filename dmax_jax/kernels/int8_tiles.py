"""Tiles of 8-bit weights within the kernels for Hopper GPUs: their products on the matrix units, and their scales.

The matrix units multiply bfloat16 by bfloat16, so int8 weights become bfloat16, which holds them exactly, on the way
from shared memory to them. The scales multiply sums and not weights.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.int8_weight import Int8Weight

TOGETHER = 128  # columns that stand together in shared memory
CHUNK = 64  # columns that are converted at once


def multiply(total, weights_s, rows_s) -> None:
    """Starts total += weights rows for a stage in shared memory, `[64, K]` and `[K, M]`, by one warpgroup.

    While the matrix units multiply a chunk of int8 weights, the next one is converted: at most two are in registers.
    """
    if weights_s.dtype != jnp.int8:
        plgpu.wgmma(total, weights_s, rows_s)
        return
    for first in range(0, weights_s.shape[1], TOGETHER):
        weights = plgpu.load(weights_s.at[:, pl.ds(first, TOGETHER)], layout=plgpu.Layout.WGMMA, optimized=False)
        for start in range(0, TOGETHER, CHUNK):
            chunk = lax.slice(weights, (0, start), (weights.shape[0], start + CHUNK)).astype(rows_s.dtype)
            plgpu.wgmma(total, chunk, rows_s.at[pl.ds(first + start, CHUNK)])
            plgpu.wgmma_wait(1)
    plgpu.commit_smem()  # what was read here may be overwritten by copies


def values_of(weight):
    """What a product multiplies by, before any scale: of a matrix or the reference to one."""
    return weight.values if isinstance(weight, Int8Weight) else weight


def load_scale(routed, expert, shared, share, channels):
    """The scales of 64 output channels, to be loaded before the sums are made, as that takes a while; None without.

    They are the shared expert's (if there is one) where `share` is 1, else those of a routed one.
    """
    if not isinstance(routed, Int8Weight):
        return None
    by_row = plgpu.Layout.WGMMA.reduce(1)
    scale = plgpu.load(routed.scale.at[expert, channels], layout=by_row, optimized=False)
    if shared is None:
        return scale
    return scale * (1 - share) + plgpu.load(shared.scale.at[channels], layout=by_row, optimized=False) * share


def scaled(sums, scale):
    return sums if scale is None else sums * lax.broadcast_in_dim(scale, sums.shape, [0])
