"""Tiles of 8-bit weights within the kernels for Hopper GPUs: their products on the matrix units, and their scales.

The matrix units multiply factors of one width, so 8-bit weights that meet rows in bfloat16 become bfloat16, which holds
them exactly, on the way from shared memory to them. The scales multiply sums and not weights.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from dmax_jax.kernels.hopper import word_type
from dmax_jax.kernels.quantised_weight import QuantisedWeight

TOGETHER = 128  # columns that stand together in shared memory
CHUNK = 64  # columns that are converted at once


def multiply(total, weights_s, rows_s) -> None:
    """Starts total += weights rows for a stage in shared memory, `[64, K]` and `[K, M]`, by one warpgroup.

    While the matrix units multiply a chunk of 8-bit weights, the next one is converted: at most two are in registers.
    """
    if weights_s.dtype == rows_s.dtype:
        plgpu.wgmma(total, weights_s, rows_s)
        return
    for first in range(0, weights_s.shape[1], TOGETHER):
        weights = plgpu.load(weights_s.at[:, pl.ds(first, TOGETHER)], layout=plgpu.Layout.WGMMA, optimized=False)
        for start in range(0, TOGETHER, CHUNK):
            chunk = to_bfloat16(lax.slice(weights, (0, start), (weights.shape[0], start + CHUNK)))
            plgpu.wgmma(total, chunk, rows_s.at[pl.ds(first + start, CHUNK)])
            plgpu.wgmma_wait(1)
    plgpu.commit_smem()  # what was read here may be overwritten by copies


def to_bfloat16(values):
    """`astype` in two and a half instructions a value, the load from shared memory included.

    The compiler's own conversion takes three and a half for int8, and goes through float16 and float32 for
    float8_e4m3fn.
    """
    of_pair = int8_to_bfloat16 if values.dtype == jnp.int8 else fp8_to_bfloat16
    layout = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct(values.shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    def convert(_, values):
        registers = np.empty_like(values.registers)
        for place, pair in np.ndenumerate(values.registers):
            two_bytes = mgpu.utils.bitcast(pair, ir.IntegerType.get_signless(16))
            registers[place] = of_pair(arith.extui(word_type(), two_bytes))
        return mgpu.FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return convert(values)


def int8_to_bfloat16(pair: ir.Value) -> ir.Value:
    """The two int8 in the lower half of a word.

    Behind the byte 0x43, seven bits b are the bfloat16 number 128 + b, and the eighth, the sign, is the lowest of the
    exponent: alone it makes 256 of 128. The value is 128 + b less 128 or 256.
    """
    behind = mgpu.utils.prmt(word(0x43434343), pair, word(0x0504))
    return arith.subf(*(two_bfloat16(arith.andi(behind, word(mask))) for mask in (0xFF7FFF7F, 0xFF80FF80)))


def fp8_to_bfloat16(pair: ir.Value) -> ir.Value:
    """The two float8_e4m3fn in the lower half of a word, which must be finite.

    Exponent and mantissa are put where bfloat16 has them, whose exponent is biased by 120 more; the product with 2**120
    also makes those below 2**-6, which have no leading one, normal numbers.
    """
    after_signs = mgpu.utils.prmt(pair, pair, word(0x9180))  # every byte behind eight times its highest bit
    moved = arith.andi(arith.shli(after_signs, word(4)), word(0x87F087F0))
    return arith.mulf(two_bfloat16(moved), two_bfloat16(word(0x7B807B80)))


def word(value: int) -> ir.Value:
    return mgpu.c(value, word_type())


def two_bfloat16(words: ir.Value) -> ir.Value:
    return mgpu.utils.bitcast(words, ir.VectorType.get((2,), ir.BF16Type.get()))


def values_of(weight):
    """What a product multiplies by, before any scale: of a matrix or the reference to one."""
    return weight.values if isinstance(weight, QuantisedWeight) else weight


def load_scale(routed, expert, shared, share, channels):
    """The scales of 64 output channels, to be loaded before the sums are made, as that takes a while; None without.

    They are the shared expert's (if there is one) where `share` is 1, else those of a routed one.
    """
    if not isinstance(routed, QuantisedWeight):
        return None
    by_row = plgpu.Layout.WGMMA.reduce(1)
    scale = plgpu.load(routed.scale.at[expert, channels], layout=by_row, optimized=False)
    if shared is None:
        return scale
    return scale * (1 - share) + plgpu.load(shared.scale.at[channels], layout=by_row, optimized=False) * share


def scaled(sums, scale):
    return sums if scale is None else sums * lax.broadcast_in_dim(scale, sums.shape, [0])
