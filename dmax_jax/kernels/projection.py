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
    kernel,
    multiprocessors,
    shared_tile,
    signal,
    stages_that_fit,
    wait_for,
)
from dmax_jax.kernels.quantised_tiles import multiply, values_of
from dmax_jax.kernels.quantised_weight import KINDS, QuantisedWeight, Weight, project
from dmax_jax.kernels.residual_norm import Parts, add_and_norm, norm_row, plain_add_and_norm
from dmax_jax.kernels.residual_norm import suits as can_norm

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


def norm_and_project(
    x: jax.Array, parts: Parts | None, norm_D: jax.Array, weight: Weight, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The sum of `x` [..., D] and parts, and the product of its RMS norm with weight [F, D]: [..., D] and [..., F]."""
    rows = x.size // x.shape[-1]
    can_count = parts is not None and parts.counters is not None
    if not (
        is_hopper()
        and can_count
        and filled_up(rows) == rows
        and suits(x.dtype, rows, weight)
        and can_norm(x.dtype, rows, x.shape[-1])
    ):
        total, normal, _ = add_and_norm(x, parts, norm_D, eps)
        return total, project_rows(normal, weight)

    def plain(x_MD, parts, norm_D, weight):
        total_MD, normal_MD, _ = plain_add_and_norm(x_MD, parts.values, norm_D, eps=eps)
        return total_MD, project(normal_MD, weight)

    x_MD = x.reshape(rows, -1)
    parts = parts.replace(values=parts.values.reshape(-1, *x_MD.shape))
    streamed = functools.partial(streamed_norm_product, eps=eps)
    total_MD, out_MF = differentiated_as(plain)(streamed)(x_MD, parts, norm_D, weight)
    return total_MD.reshape(x.shape), out_MF.reshape(*x.shape[:-1], -1)


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


def parts_that_fit(rows: int, features: int, depth: int, blocks: int) -> int:
    """Blocks of threads that share the columns of 64 features, so that most of the `blocks` have something to read.

    Each of them joins at least 8 rows' sums.
    """
    parts = 1
    while 2 * parts <= min(MAX_PARTS, rows // 8) and features // ROWS * 2 * parts <= blocks:
        if depth % (2 * parts * DEPTH):
            break
        parts *= 2
    return parts


def streamed_product(
    x_MD: jax.Array,
    weight: Weight,
    residual_MF: jax.Array | None = None,
    *,
    dtype: jnp.dtype | None = None,
    parts: int | None = None,
    interpret=False,
) -> jax.Array:
    """`project_rows` of at most 128 rows on a Hopper GPU: [M, F]."""
    M = len(x_MD)
    fill = (0, filled_up(M) - M), (0, 0)
    residual_MF = None if residual_MF is None else jnp.pad(residual_MF, fill)
    how = {"dtype": dtype, "parts": parts, "interpret": interpret}
    return streamed_tiles(jnp.pad(x_MD, fill), weight, residual_MF, **how)[0][:M]


def streamed_norm_product(
    x_MD: jax.Array,
    added: Parts,
    norm_D: jax.Array,
    weight: Weight,
    *,
    eps: float,
    parts: int | None = None,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The sum of `x` and parts, and the product of its RMS norm with a matrix, as `add_and_norm` and `project_rows`.

    The matrix is on its way while some of the blocks of threads add and normalise a row each, which all wait for. So
    all have to run at once, as in `streamed_experts`; and as a cluster has to find room in one part of the GPU, they
    are at most three quarters of what would fit one by one.
    """
    out_MF, total_MD, _ = streamed_tiles(x_MD, weight, None, added, norm_D, eps=eps, parts=parts, interpret=interpret)
    return total_MD, out_MF


@kernel("dtype", "parts", "eps")
def streamed_tiles(
    x_MD: jax.Array,
    weight: Weight,
    residual_MF: jax.Array | None,
    added: Parts | None = None,
    norm_D: jax.Array | None = None,
    *,
    dtype: jnp.dtype | None = None,
    parts: int | None = None,
    eps: float = 0.0,
    interpret=False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The product of 16, 32, 64 or 128 rows; if parts are added and normalised first, also their sum and its norm.

    A cluster of `parts` blocks of threads (default: as many as there is room for) has 64 features, each block a part of
    the columns. It stores its sums in the others' shared memory, and each block joins those of its share of the rows.
    """
    (rows, D), (F, _) = x_MD.shape, weight.shape
    dtype = dtype or x_MD.dtype
    blocks = multiprocessors() if added is None else multiprocessors() * 3 // 4
    parts = parts or parts_that_fit(rows, F, D, blocks)
    tiles = F // ROWS
    steps, share = D // parts // DEPTH, rows // parts
    stage_bytes = (ROWS * weight.dtype.itemsize + rows * x_MD.dtype.itemsize) * DEPTH
    received_bytes = ROWS * rows * 4 if parts > 1 else 0
    stages = min(steps, stages_that_fit(stage_bytes, 2 * received_bytes, most=16))
    wgmma, turned = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def body(
        x, weight, residual, added, norm, counters, out, total, normal,
        x_s, weight_s, full, given_s=None, received_s=None, received=None,
    ):  # fmt: skip
        tile, part = lax.axis_index("tile"), lax.axis_index("part")
        features, own_rows = pl.ds(tile * ROWS, ROWS), pl.ds(part * share, share)
        ready = x if added is None else normal

        def fetch(step, ref, own, scratch):
            slot, columns = lax.rem(step, stages), pl.ds((part * steps + step) * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(ref.at[own, columns], scratch.at[slot], full.at[slot])

        def fetch_weights(step):
            fetch(step, values_of(weight), features, weight_s)

        def fetch_rows(step):
            fetch(step, ready, slice(None), x_s)

        pl.loop(0, stages)(fetch_weights)
        if added is not None:
            done = counters.at[counters.shape[0] - 1]

            @pl.loop(tile * parts + part, rows, step=tiles * parts)
            def _norm(row):
                norm_row(row, x, added, norm, normal, total, None, eps=eps)
                signal(done)

            wait_for(done, rows)
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
                    fetch_weights(step + stages)
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
    rows_type = None if added is None else jax.ShapeDtypeStruct((rows, D), x_MD.dtype)
    values, counters = (None, None) if added is None else (added.values, jax.new_ref(added.counters))
    # The interpreter runs blocks that wait for each other only where they are in one cluster.
    where = {"grid": (tiles,), "grid_names": ("tile",), "cluster": (parts,), "cluster_names": ("part",)}
    if interpret and added is not None:
        where = {"cluster": (tiles, parts), "cluster_names": ("tile", "part")}
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows, F), dtype), rows_type, rows_type),
        **where,
        scratch_types=[
            shared_tile((stages, rows, DEPTH), x_MD.dtype),
            shared_tile((stages, ROWS, DEPTH), weight.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            *((shares, shares, counter()) if parts > 1 else ()),
        ],
        interpret=interpret,
    )(x_MD, weight, residual_MF, values, norm_D, counters)
