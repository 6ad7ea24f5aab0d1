"""Products of rows with a matrix, and the kernel for few rows: what takes long then is reading the matrix."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.clusters import counter, expect, give, leave, wait_for_all
from dmax_jax.kernels.hopper import (
    ROWS,
    differentiated_as,
    filled_up,
    is_hopper,
    multiprocessors,
    shared_tile,
    stages_that_fit,
)
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier
from dmax_jax.kernels.quantised_tiles import multiply, values_of
from dmax_jax.kernels.quantised_weight import KINDS, QuantisedWeight, Weight, project

MAX_ROWS = 128
MAX_PARTS = 8  # blocks of threads in a cluster
DEPTH = 128  # columns of the weights in a stage


def project_rows(
    x: jax.Array, weight: Weight, residual: jax.Array | None = None, *, dtype: jnp.dtype | None = None
) -> jax.Array:
    """[..., in] times weight [out, in], plus the residual [..., out] if there is one: [..., out].

    The product is rounded to `dtype`, default that of `x`, before the sum. bfloat16 factors stay what they are.
    """
    dtype = dtype or x.dtype
    rows = x.size // x.shape[-1]
    if not (is_hopper() and suits(x.dtype, rows, weight)):
        return plain_product(x, weight, residual, dtype=dtype)
    x_MD, residual_MF = (None if a is None else a.reshape(rows, a.shape[-1]) for a in (x, residual))
    plain, streamed = (functools.partial(product, dtype=dtype) for product in (plain_product, streamed_product))
    return differentiated_as(plain)(streamed)(x_MD, weight, residual_MF).reshape(*x.shape[:-1], weight.shape[0])


def plain_product(x: jax.Array, weight: Weight, residual: jax.Array | None, *, dtype: jnp.dtype) -> jax.Array:
    """`project_rows` by XLA."""
    if dtype != x.dtype and not isinstance(weight, QuantisedWeight):
        weight = weight.astype(dtype)
    out = project(x.astype(dtype), weight)
    return out if residual is None else residual + out


def suits(dtype: jnp.dtype, rows: int, weight: Weight) -> bool:
    """Whether `streamed_product` takes these dtypes and sizes, and a block of threads per 64 features runs at once."""
    F, D = weight.shape
    known = weight.dtype in (dtype, *KINDS.values()) and dtype == jnp.bfloat16
    return known and rows <= MAX_ROWS and F % ROWS == D % DEPTH == 0 and multiprocessors() >= F // ROWS


def parts_that_fit(rows: int, features: int, depth: int) -> int:
    """Blocks of threads that share the columns of 64 features, so that most multiprocessors have something to read.

    Each of them joins at least 8 rows' sums.
    """
    parts = 1
    while 2 * parts <= min(MAX_PARTS, rows // 8) and features // ROWS * 2 * parts <= multiprocessors():
        if depth % (2 * parts * DEPTH):
            break
        parts *= 2
    return parts


@kernel("dtype", "parts")
def streamed_product(
    x_MD: jax.Array,
    weight: Weight,
    residual_MF: jax.Array | None = None,
    *,
    dtype: jnp.dtype | None = None,
    parts: int | None = None,
    interpret=False,
    overlap=False,
) -> jax.Array:
    """`project_rows` of at most 128 rows on a Hopper GPU: [M, F].

    A cluster of `parts` blocks of threads (default: as many as there is room for) has 64 features, each block a part of
    the columns. It stores its sums in the others' shared memory, and each block joins those of its share of the rows.
    """
    (M, D), (F, _) = x_MD.shape, weight.shape
    dtype, rows = dtype or x_MD.dtype, filled_up(M)
    fill = (0, rows - M), (0, 0)
    x_MD = jnp.pad(x_MD, fill)
    residual_MF = None if residual_MF is None else jnp.pad(residual_MF, fill)
    parts = parts or parts_that_fit(rows, F, D)
    steps, share = D // parts // DEPTH, rows // parts
    stage_bytes = (ROWS * weight.dtype.itemsize + rows * x_MD.dtype.itemsize) * DEPTH
    received_bytes = ROWS * rows * 4 if parts > 1 else 0
    stages = min(steps, stages_that_fit(stage_bytes, 2 * received_bytes, most=16))
    wgmma, turned = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def body(x, weight, residual, out, x_s, weight_s, full, given_s=None, received_s=None, received=None):
        tile, part = lax.axis_index("tile"), lax.axis_index("part")
        features, own_rows = pl.ds(tile * ROWS, ROWS), pl.ds(part * share, share)

        def place(step):
            return lax.rem(step, stages), pl.ds((part * steps + step) * DEPTH, DEPTH)

        def fetch_weight(step):
            slot, columns = place(step)
            plgpu.copy_gmem_to_smem(values_of(weight).at[features, columns], weight_s.at[slot], full.at[slot])

        def fetch_rows(step):
            slot, columns = place(step)
            plgpu.copy_gmem_to_smem(x.at[:, columns], x_s.at[slot], full.at[slot])

        pl.loop(0, stages)(fetch_weight)
        wait_for_earlier(overlap)
        start_next(overlap)
        pl.loop(0, stages)(fetch_rows)

        if residual is not None:  # loaded while the first stages are on their way
            residual_FM = load(residual.at[own_rows, features].transpose((1, 0)), turned)
        if parts > 1:
            expect(received, received_bytes)

        def add_all(total):
            @pl.loop(0, steps)
            def _step(step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])
                multiply(total, weight_s.at[slot], x_s.at[slot].transpose((1, 0)))

                @pl.when(step + stages < steps)
                def _next():
                    plgpu.wgmma_wait(0)
                    fetch_weight(step + stages)
                    fetch_rows(step + stages)

            return total[...]

        total_FM = pl.run_scoped(add_all, plgpu.ACC((ROWS, rows), jnp.float32))
        if parts > 1:
            for number in range(parts):
                given_s[number] = lax.slice(total_FM, (0, number * share), (ROWS, (number + 1) * share))
            give([given_s], [received_s], received)
            wait_for_all(received)
            total_FM = sum(load(received_s.at[i], wgmma) for i in range(parts))
        if isinstance(weight, QuantisedWeight):
            total_FM *= lax.broadcast_in_dim(load(weight.scale.at[features], wgmma.reduce(1)), total_FM.shape, [0])
        total_FM = plgpu.layout_cast(total_FM.astype(dtype), turned)
        if residual is not None:
            total_FM += residual_FM
        out.at[own_rows, features].transpose((1, 0))[...] = total_FM
        if parts > 1:
            leave()

    shares = shared_tile((parts, ROWS, share), jnp.float32)
    out_MF = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, F), dtype),
        grid=(F // ROWS,),
        grid_names=("tile",),
        cluster=(parts,),
        cluster_names=("part",),
        scratch_types=[
            shared_tile((stages, rows, DEPTH), x_MD.dtype),
            shared_tile((stages, ROWS, DEPTH), weight.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            *((shares, shares, counter()) if parts > 1 else ()),
        ],
        interpret=interpret,
    )(x_MD, weight, residual_MF)
    return out_MF[:M]
