"""The routed experts of many rows: rows are brought together by expert, in tiles that multiply one expert each.

Every expert's weights come from memory once, as with few rows, but multiply only the rows that chose it. The places of
rows are counted rather than sorted.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.hopper import ROWS, Stream, barriers, kernel, multiprocessors, shared_tile, stages_that_fit
from dmax_jax.kernels.layers import swiglu
from dmax_jax.kernels.quantised_tiles import load_scale, multiply, scaled, values_of
from dmax_jax.kernels.streamed_experts import (
    MAX_ROWS,
    PARAMS,
    WARPGROUPS,
    Matrices,
    expert_at,
    expert_hidden,
    stage_depth,
)


def grouped_experts(
    x_MD: jax.Array,
    choice: Choice,
    experts: Matrices,
    shared: Matrices,
    *,
    experts_per_row: int,
    blocks: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`routed_experts` on a Hopper GPU, by `blocks` blocks of threads (default: one per multiprocessor)."""
    (M, E), D = choice.weights_ME.shape, x_MD.shape[1]
    groups = group_rows(choice.weights_ME, experts_per_row, tile_rows(M * experts_per_row, E))
    how = {"blocks": blocks or multiprocessors(), "interpret": interpret}
    x_TRD = x_MD[groups.rows_TR]
    hidden_TFR = expert_hidden(x_TRD, experts[:2], None, groups.ids_T, groups.upto_E, groups.weights_TR, **how)
    out_TRD = tile_outputs(hidden_TFR, experts[2], groups.ids_T, groups.upto_E, **how)
    out_MXD = out_TRD.reshape(-1, D)[groups.places_MX].astype(jnp.float32)
    out_MXD = jnp.where(groups.taken_MX[:, :, None], out_MXD, 0)
    return jnp.sum(out_MXD, axis=1).astype(x_MD.dtype) + swiglu(x_MD, *shared)


@struct.dataclass
class Groups:
    """T tiles of R rows: those of the experts up to e are the first `upto_E[e]`, and `ids_T` says whose each is."""

    rows_TR: jax.Array  # any row where there is none
    weights_TR: jax.Array  # 0 where there is no row
    ids_T: jax.Array
    upto_E: jax.Array
    places_MX: jax.Array  # of every row's pairs among the T R places
    taken_MX: jax.Array  # false for the pairs that a row has too few experts for


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: room for most experts' rows, as the matrix units multiply as many at once."""
    mean = -(-pairs // experts)
    return min(MAX_ROWS, max(16, 1 << (2 * mean - 1).bit_length()))


def group_rows(weights_ME: jax.Array, experts_per_row: int, tile: int) -> Groups:
    """Gives every (row, expert) pair a place: an expert's rows, in their order, fill tiles of their own."""
    M, E = weights_ME.shape
    pairs = M * experts_per_row
    T = min(E, pairs) + pairs // tile
    taken_ME = weights_ME > 0
    rank_ME = count_above(taken_ME)
    tiles_E = -(-jnp.sum(taken_ME, axis=0, dtype=jnp.int32) // tile)
    order_E = jnp.arange(E)
    upto_E = jnp.sum(jnp.where(order_E[None] <= order_E[:, None], tiles_E[None], 0), axis=1)
    place_ME = ((upto_E - tiles_E) * tile)[None] + rank_ME
    weights_MX, ids_MX = lax.top_k(weights_ME, experts_per_row)
    taken_MX = weights_MX > 0
    places_MX = jnp.where(taken_MX, jnp.take_along_axis(place_ME, ids_MX, axis=1), T * tile)

    def spread(values_MX: jax.Array) -> jax.Array:
        empty_P = jnp.zeros(T * tile, values_MX.dtype)
        return empty_P.at[places_MX].set(values_MX, mode="drop", unique_indices=True).reshape(T, tile)

    return Groups(
        rows_TR=spread(jnp.broadcast_to(jnp.arange(M)[:, None], places_MX.shape)),
        weights_TR=spread(weights_MX),
        ids_T=jnp.sum(upto_E[None] <= jnp.arange(T)[:, None], axis=1, dtype=jnp.int32),
        upto_E=upto_E,
        places_MX=jnp.where(taken_MX, places_MX, 0),
        taken_MX=taken_MX,
    )


def count_above(marked_ME: jax.Array) -> jax.Array:
    """How many entries of a column are true above each entry: products within chunks of rows, sums over chunks."""
    M, E = marked_ME.shape
    chunk = min(M, MAX_ROWS)
    marked_CRE = jnp.pad(marked_ME, ((0, -M % chunk), (0, 0))).reshape(-1, chunk, E).astype(jnp.bfloat16)
    above_RR = jnp.tri(chunk, k=-1, dtype=jnp.bfloat16)
    within_CRE = jnp.einsum("rs,cse->cre", above_RR, marked_CRE, preferred_element_type=jnp.float32)
    sums_CE = jnp.sum(marked_CRE, axis=1, dtype=jnp.float32)
    before_CE = jnp.cumsum(sums_CE, axis=0) - sums_CE
    return (within_CRE + before_CE[:, None]).astype(jnp.int32).reshape(-1, E)[:M]


@kernel("blocks")
def tile_outputs(hidden_TFR, down_EDF, ids_T, upto_E, *, blocks: int, interpret=False) -> jax.Array:
    """down hidden of every tile: [T, R, D]; what lies past the last of `upto_E` is not written.

    Blocks of threads walk over (tile, 128 features) in turn.
    """
    (_, F, R), (E, D, _), T = hidden_TFR.shape, down_EDF.shape, len(ids_T)
    dtype, weight_dtype, width = hidden_TFR.dtype, down_EDF.dtype, WARPGROUPS * ROWS
    depth = stage_depth(R, F, weight_dtype)
    steps, widths = F // depth, D // width
    stages = stages_that_fit((width * weight_dtype.itemsize + R * dtype.itemsize) * depth, width * R * dtype.itemsize)

    row_bytes = 128 if weight_dtype != dtype else R * dtype.itemsize

    def body(hidden, down, ids, upto, out, hidden_s, down_s, out_s, full, empty):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        own = pl.cdiv(upto[upto.shape[0] - 1] * widths - block, blocks)
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return lax.div(at, widths), lax.rem(at, widths) * width

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                tile, first = place(lax.div(step, steps))
                columns = pl.ds(lax.rem(step, steps) * depth, depth)
                plgpu.copy_gmem_to_smem(hidden.at[tile, columns], hidden_s.at[slot], barrier)
                features = values_of(down).at[expert_at(ids, tile, E), pl.ds(first, width), columns]
                plgpu.copy_gmem_to_smem(features, down_s.at[slot], barrier)

            stream.fill(own * steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds(warpgroup * ROWS, ROWS)

            @pl.loop(0, own)
            def _tile(turn):
                tile, first = place(turn)

                channels = pl.ds(first + warpgroup * ROWS, ROWS)
                scale = load_scale(down, expert_at(ids, tile, E), None, 0.0, channels)

                def products(total):
                    @pl.loop(0, steps)
                    def _step(step):
                        stream.use(
                            turn * steps + step,
                            lambda slot: multiply(total, down_s.at[slot, rows], hidden_s.at[slot], interpret=interpret),
                        )

                    return total[...]

                total_DR = scaled(pl.run_scoped(products, plgpu.ACC((ROWS, R), jnp.float32)), scale).astype(dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left its buffer
                total_DR = plgpu.layout_cast(total_DR, plgpu.Layout.WGMMA_TRANSPOSED)
                out_s.at[warpgroup].transpose((1, 0))[...] = total_DR
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out.at[tile, :, channels])

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, R, D), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((stages, depth, R), dtype),
            shared_tile((stages, width, depth), weight_dtype, row_bytes=row_bytes),
            shared_tile((WARPGROUPS, R, ROWS), dtype),
            *barriers(copies=2, warpgroups=WARPGROUPS, stages=stages),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(hidden_TFR, down_EDF, ids_T, upto_E)
