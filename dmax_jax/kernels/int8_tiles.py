"""Tiles of 8-bit weights within the kernels for Hopper GPUs: their products on the matrix units, and their scales.

The matrix units multiply bfloat16 by bfloat16, so int8 weights become bfloat16, which holds them exactly, on the way
from shared memory to them. The scales multiply sums and not weights.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from dmax_jax.kernels.int8_weight import Int8Weight

TOGETHER = 128  # columns that stand together in shared memory
CHUNK = 64  # columns that are converted at once


def multiply(total, weights_s, rows_s, *, interpret: Any) -> None:
    """Starts total += weights rows for a stage in shared memory, `[64, K]` and `[K, M]`, by one warpgroup.

    While the matrix units multiply a chunk of int8 weights, the next one is converted: at most two are in registers.
    """
    if weights_s.dtype != jnp.int8:
        plgpu.wgmma(total, weights_s, rows_s)
        return
    for first in range(0, weights_s.shape[1], TOGETHER):
        weights = plgpu.load(weights_s.at[:, pl.ds(first, TOGETHER)], layout=plgpu.Layout.WGMMA, optimized=False)
        for start in range(0, TOGETHER, CHUNK):
            chunk = lax.slice(weights, (0, start), (weights.shape[0], start + CHUNK))
            chunk = chunk.astype(rows_s.dtype) if interpret else to_bfloat16(chunk)
            plgpu.wgmma(total, chunk, rows_s.at[pl.ds(first + start, CHUNK)])
            plgpu.wgmma_wait(1)
    plgpu.commit_smem()  # what was read here may be overwritten by copies


def to_bfloat16(values):
    """`astype`, in half the instructions: the interpreter, which knows no inline code, calls that.

    The compiler's own conversion takes two more per pair of values, and the matrix units wait for it.
    """
    layout = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct(values.shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    def convert(_, values):
        registers = np.empty_like(values.registers)
        for place, pair in np.ndenumerate(values.registers):
            registers[place] = int8_pair_to_bfloat16(pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return convert(values)


def int8_pair_to_bfloat16(pair: ir.Value) -> ir.Value:
    """Two values in four instructions.

    A byte b below 0x4300, which is 128, is 128 + b while b < 128. The top bit would be the exponent's lowest: without
    it the number is 128 + (b & 127), and alone it makes 256 of 128; the difference of the two is b with its sign.
    """
    word = ir.IntegerType.get_signless(32)
    pair_of_bfloat16 = ir.VectorType.get((2,), ir.BF16Type.get())
    pair = arith.extui(word, mgpu.utils.bitcast(pair, ir.IntegerType.get_signless(16)))
    spread = mgpu.utils.prmt(mgpu.c(0x43434343, word), pair, mgpu.c(0x0504, word))
    below, sign = (
        mgpu.utils.bitcast(arith.andi(spread, mgpu.c(mask, word)), pair_of_bfloat16)
        for mask in (0xFF7FFF7F, 0xFF80FF80)
    )
    return arith.subf(below, sign)


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
