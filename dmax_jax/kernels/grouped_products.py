"""Products of tiles of rows with one expert each, for `grouped_experts`: gate and up, and then down.

T tiles have R rows each, R being a multiple of 16 up to 128. The last of `upto` says how many tiles there are; what
belongs to those past them is not written. Blocks of threads walk over (tile, features) in turn.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.expert_tiles import (
    FETCHER,
    PARAMS,
    WARPGROUPS,
    WIDTH,
    WRITER,
    exchange,
    exchange_bytes,
    expert_at,
    make_hidden,
    per_row,
    products,
    ring,
    stage_depth,
    write_hidden,
)
from dmax_jax.kernels.hopper import ROWS, Stream, kernel, shared_tile
from dmax_jax.kernels.quantised_tiles import load_scale, scaled, values_of


@kernel("blocks")
def tile_hidden(x_TRD, matrices, ids_T, upto, weights_P, *, blocks: int, interpret=False) -> jax.Array:
    """silu(gate x) * (up x) * weight for every tile and its expert: [T, R, F]. `matrices` are gate and up."""
    (T, R, D), (E, F, _) = x_TRD.shape, matrices[0].shape
    dtype, weight_dtype = x_TRD.dtype, matrices[0].dtype
    depth = stage_depth(R, D)
    stages, ring_types = ring(R, depth, dtype, weight_dtype, exchange_bytes(R, dtype))
    features, steps = F // ROWS, D // depth

    def body(x, matrices, ids, upto, weights, out, rows_s, weights_s, full, empty, exchanged):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        own = pl.cdiv(upto[upto.shape[0] - 1] * features - block, blocks)
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return lax.div(at, features), pl.ds(lax.rem(at, features) * ROWS, ROWS)

        @pl.when(warpgroup == FETCHER)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                tile, channels = place(lax.div(step, steps))
                columns = pl.ds(lax.rem(step, steps) * depth, depth)
                plgpu.copy_gmem_to_smem(x.at[tile, :, columns], rows_s.at[slot], barrier)
                for half, matrix in enumerate(matrices):
                    own_half = values_of(matrix).at[expert_at(ids, tile, E), channels, columns]
                    plgpu.copy_gmem_to_smem(own_half, weights_s.at[half, slot], barrier)

            stream.fill(own * steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(216, action="increase")

            def product(turn, matrix):
                tile, channels = place(turn)
                scale = load_scale(matrices[matrix], expert_at(ids, tile, E), None, 0.0, channels)
                return scaled(products(stream, weights_s.at[matrix], rows_s, turn * steps, (turn + 1) * steps), scale)

            def weights_of(turn):
                return per_row(weights.at[pl.ds(place(turn)[0] * R, R)], R)

            make_hidden(own, product, weights_of, exchanged)

        @pl.when(warpgroup == WRITER)
        def _write():
            plgpu.set_max_registers(40, action="decrease")

            def target(turn):
                tile, channels = place(turn)
                return out.at[tile, :, channels]

            write_hidden(own, target, lambda turn: None, exchanged)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, R, F), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WRITER + 1,
        thread_name="warpgroup",
        scratch_types=[*ring_types, exchange(R, dtype)],
        compiler_params=PARAMS,
        interpret=interpret,
    )(x_TRD, matrices, ids_T, upto, weights_P)


@kernel("blocks")
def tile_outputs(hidden_TRF, down_EDF, ids_T, upto, *, blocks: int, interpret=False) -> jax.Array:
    """down hidden for every tile and its expert: [T, R, D]."""
    (T, R, F), (E, D, _) = hidden_TRF.shape, down_EDF.shape
    dtype, weight_dtype = hidden_TRF.dtype, down_EDF.dtype
    depth = stage_depth(R, F)
    stages, ring_types = ring(R, depth, dtype, weight_dtype, WIDTH * R * dtype.itemsize)
    features, steps = D // WIDTH, F // depth

    def body(hidden, down, ids, upto, out, rows_s, weights_s, full, empty, out_s):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        own = pl.cdiv(upto[upto.shape[0] - 1] * features - block, blocks)
        stream = Stream(full, empty, stages)

        def place(turn, half):
            at = block + turn * blocks
            return lax.div(at, features), pl.ds(lax.rem(at, features) * WIDTH + half * ROWS, ROWS)

        @pl.when(warpgroup == FETCHER)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                columns = pl.ds(lax.rem(step, steps) * depth, depth)
                for half in range(WARPGROUPS):
                    tile, channels = place(lax.div(step, steps), half)
                    own_half = values_of(down).at[expert_at(ids, tile, E), channels, columns]
                    plgpu.copy_gmem_to_smem(own_half, weights_s.at[half, slot], barrier)
                plgpu.copy_gmem_to_smem(hidden.at[tile, :, columns], rows_s.at[slot], barrier)

            stream.fill(own * steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, own)
            def _tile(turn):
                tile, channels = place(turn, warpgroup)
                scale = load_scale(down, expert_at(ids, tile, E), None, 0.0, channels)
                out_DR = products(stream, weights_s.at[warpgroup], rows_s, turn * steps, (turn + 1) * steps)
                out_DR = plgpu.layout_cast(scaled(out_DR, scale).astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left its buffer
                out_s.at[warpgroup].transpose((1, 0))[...] = out_DR
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out.at[tile, :, channels])

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, R, D), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=FETCHER + 1,
        thread_name="warpgroup",
        scratch_types=[*ring_types, shared_tile((WARPGROUPS, R, ROWS), dtype)],
        compiler_params=PARAMS,
        interpret=interpret,
    )(hidden_TRF, down_EDF, ids_T, upto)
