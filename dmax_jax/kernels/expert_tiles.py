"""What the kernels for experts of few rows and of many share: tiles of weights times rows, within a block of threads.

Weights are the left factor of the matrix units' products, in the orientation of the checkpoint, and rows the right one,
so the sums are transposed. One warpgroup fetches both through a ring of buffers; two multiply, each its own half of the
weights; one writes hidden features to global memory. Rows stand in shared memory as in global memory, [rows, columns],
in both of an expert's products.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.hopper import ROWS, Stream, barriers, shared_tile, stages_that_fit
from dmax_jax.kernels.quantised_tiles import multiply
from dmax_jax.kernels.quantised_weight import KINDS, Weight

MAX_ROWS = 128
WARPGROUPS = 2  # that multiply
FETCHER, WRITER = WARPGROUPS, WARPGROUPS + 1  # one more fetches weights and rows, one writes hidden features
WIDTH = WARPGROUPS * ROWS  # rows of the weights in a stage
PARAMS = plgpu.CompilerParams(approx_math=True)

Matrices = tuple[Weight, Weight, Weight]  # gate, up and down


def suits_kernels(x_MD: jax.Array, experts: Matrices) -> bool:
    """Whether dtype and sizes are those that the kernels work in."""
    _, F, D = experts[0].shape
    alike = {matrix.dtype for matrix in experts} in [{dtype} for dtype in (x_MD.dtype, *KINDS.values())]
    return x_MD.dtype == jnp.bfloat16 and alike and D % WIDTH == F % WIDTH == 0


def are_alike(experts: Matrices, shared: Matrices) -> bool:
    """Whether the shared expert has the routed ones' sizes and dtype."""
    return all(a.shape[1:] == b.shape and a.dtype == b.dtype for a, b in zip(experts, shared, strict=True))


def stage_depth(rows: int, columns: int) -> int:
    """Columns of the weights in a stage: few large copies, if the rows leave room for two stages or more."""
    return math.gcd(256 if rows <= 64 else 128, columns)


def ring(rows: int, depth: int, row_dtype, weight_dtype, other_bytes: int, digits: bool = False) -> tuple[int, list]:
    """How many stages fit beside `other_bytes`, and the scratch of a ring: rows, weights by half, barriers.

    With `digits`, the memory for rows of two bytes is also that for their digits: [rows, digits].
    """
    row_bytes, weight_bytes = (jnp.dtype(dtype).itemsize for dtype in (row_dtype, weight_dtype))
    stages = stages_that_fit((rows * row_bytes + WIDTH * weight_bytes) * depth, other_bytes)
    rows_s = shared_tile((stages, rows, depth), row_dtype)
    if digits:
        rows_s = plgpu.RefUnion(rows_s, shared_tile((stages, 2 * rows, depth), jnp.int8))
    weights_s = shared_tile((WARPGROUPS, stages, ROWS, depth), weight_dtype)
    return stages, [rows_s, weights_s, *barriers(copies=1 + WARPGROUPS, warpgroups=WARPGROUPS, stages=stages)]


def expert_at(ids, place: jax.Array, experts: int) -> jax.Array:
    """The expert that stands at a place of the list; any expert past its end, where the shared one is."""
    return jnp.minimum(ids[jnp.minimum(place, ids.shape[0] - 1)], experts - 1)


def products(stream: Stream, weights_s, rows_s, start, stop) -> jax.Array:
    """Sums weights times rows over the stages of some steps: [64, M], by one warpgroup.

    The sums are float32; those of int8 weights times int8 digits of rows are int32.
    """
    dtype = jnp.int32 if rows_s.dtype == jnp.int8 else jnp.float32

    def multiply_all(total):
        @pl.loop(start, stop)
        def _step(step):
            stream.use(step, lambda slot: multiply(total, weights_s.at[slot], rows_s.at[slot].transpose((1, 0))))

        return total[...]

    return pl.run_scoped(multiply_all, plgpu.ACC((ROWS, rows_s.shape[1]), dtype))


def exchange_bytes(rows: int, dtype) -> int:
    return ROWS * rows * (4 + jnp.dtype(dtype).itemsize)


def exchange(rows: int, dtype) -> list:
    """The scratch of `make_hidden` and `write_hidden`: a tile of up's product, one of hidden features, barriers."""
    return [shared_tile((ROWS, rows), jnp.float32), shared_tile((rows, ROWS), dtype), *[plgpu.Barrier()] * 4]


def make_hidden(turns, product, weights_of, exchanged) -> None:
    """silu(gate x) * (up x) * weight for the tiles of 64 features of this block of threads, by two warpgroups.

    `product(turn, matrix)` is a tile's product with gate (0) or up (1), which the second warpgroup hands to the first,
    and `weights_of(turn)` are the rows' weights. Every tile is left in the scratch `exchanged` for `write_hidden`.
    """
    raised_s, hidden_s, raised_full, raised_empty, full, empty = exchanged

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _raise():
        @pl.loop(0, turns)
        def _tile(turn):
            raised = product(turn, 1)
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(raised_empty))
            raised_s[...] = raised
            plgpu.barrier_arrive(raised_full)

        pl.when(turns > 0)(lambda: plgpu.barrier_wait(raised_empty))

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _gate():
        @pl.loop(0, turns)
        def _tile(turn):
            weight_M = weights_of(turn)
            gated = product(turn, 0)
            plgpu.barrier_wait(raised_full)
            raised = plgpu.load(raised_s, layout=plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(raised_empty)
            hidden_FM = gated / (1 + jnp.exp(-gated)) * raised * lax.broadcast_in_dim(weight_M, gated.shape, [1])
            hidden_FM = plgpu.layout_cast(hidden_FM.astype(hidden_s.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(empty))
            hidden_s.transpose((1, 0))[...] = hidden_FM
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)

        pl.when(turns > 0)(lambda: plgpu.barrier_wait(empty))


def write_hidden(turns, target, announce, exchanged) -> None:
    """Copies the tiles of `make_hidden` to `target(turn)` in global memory, by a warpgroup that has nothing else to do.

    `announce(turn)` is called when one has got there: that takes about a microsecond, which no product waits for.
    """
    _, hidden_s, *_, full, empty = exchanged

    @pl.loop(0, turns)
    def _tile(turn):
        plgpu.barrier_wait(full)
        plgpu.copy_smem_to_gmem(hidden_s, target(turn))
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(empty)
        announce(turn)


def per_row(numbers, rows: int) -> jax.Array:
    """A number for each of the first rows, laid out as the columns of the sums."""
    return plgpu.load(numbers.at[pl.ds(0, rows)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
