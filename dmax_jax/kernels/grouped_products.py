"""Products of tiles of rows with one expert each, for `grouped_experts`: gate and up, and then down.

T tiles have R rows each, R being a multiple of 16 up to 128, as `row_groups.py` fills them. If the shared expert is one
more, with all M rows, it has the next S = ceil(M / R) tiles, of which the last one ends with the last row. What belongs
to tiles that don't exist is not written. Blocks of threads walk over (tile, features) in turn.
"""

import jax
import jax.numpy as jnp
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
    make_hidden,
    per_row,
    products,
    ring,
    stage_depth,
    write_hidden,
)
from dmax_jax.kernels.hopper import ROWS, Stream, shared_tile
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier
from dmax_jax.kernels.quantised_tiles import load_scale, scaled, values_of
from dmax_jax.kernels.row_groups import Tiles


@kernel("blocks")
def tile_hidden(
    x_MD, rows_TRD, matrices, tiles: Tiles, weights_P, *, blocks: int, interpret=False, overlap=False
) -> jax.Array:
    """silu(gate x) * (up x) * weight for every tile and its expert: [T + S, R, F].

    `matrices` are gate and up, each of the routed experts and of the shared one. Without the latter, `x_MD` is None.
    """
    (T, R, D), (E, F, _) = rows_TRD.shape, matrices[0][0].shape
    dtype, weight_dtype = rows_TRD.dtype, matrices[0][0].dtype
    shared_tiles = 0 if x_MD is None else pl.cdiv(len(x_MD), R)
    depth = stage_depth(R, D)
    stages, ring_types = ring(R, depth, dtype, weight_dtype, exchange_bytes(R, dtype))
    features, steps = F // ROWS, D // depth

    def body(x, rows, matrices, tiles, weights, out, rows_s, weights_s, full, empty, exchanged):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        wait_for_earlier(overlap)
        start_next(overlap)
        order = Order(tiles, T, shared_tiles, E)
        own = pl.cdiv(order.count * features - block, blocks)
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return order.find(lax.div(at, features)), pl.ds(lax.rem(at, features) * ROWS, ROWS)

        @pl.when(warpgroup == FETCHER)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                found, channels = place(lax.div(step, steps))
                columns = pl.ds(lax.rem(step, steps) * depth, depth)

                @found.when_routed
                def _routed():
                    plgpu.copy_gmem_to_smem(rows.at[found.number, :, columns], rows_s.at[slot], barrier)

                @found.when_shared
                def _shared():
                    first = jnp.minimum(found.number * R, x.shape[0] - R)
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(first, R), columns], rows_s.at[slot], barrier)

                for half, matrix in enumerate(matrices):
                    found.fetch(matrix, channels, columns, weights_s.at[half, slot], barrier)

            stream.fill(own * steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(216, action="increase")

            def product(turn, matrix):
                found, channels = place(turn)
                scale = found.scale(matrices[matrix], channels)
                return scaled(products(stream, weights_s.at[matrix], rows_s, turn * steps, (turn + 1) * steps), scale)

            def weights_of(turn):
                found, _ = place(turn)
                weights_R = per_row(weights.at[pl.ds(found.number * R, R)], R)
                return jnp.where(lax.broadcast(found.is_shared, (R,)), 1.0, weights_R)

            make_hidden(own, product, weights_of, exchanged)

        @pl.when(warpgroup == WRITER)
        def _write():
            plgpu.set_max_registers(40, action="decrease")

            def target(turn):
                found, channels = place(turn)
                return out.at[found.stands, :, channels]

            write_hidden(own, target, lambda turn: None, exchanged)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T + shared_tiles, R, F), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WRITER + 1,
        thread_name="warpgroup",
        scratch_types=[*ring_types, exchange(R, dtype)],
        compiler_params=PARAMS,
        interpret=interpret,
    )(x_MD, rows_TRD, matrices, tiles, weights_P)


@kernel("blocks", "routed_tiles")
def tile_outputs(
    hidden_TRF, down, tiles: Tiles, *, routed_tiles: int, blocks: int, interpret=False, overlap=False
) -> jax.Array:
    """down hidden for every tile and its expert: [T + S, R, D].

    `down` is that of the routed experts and the shared one's, if that is one more. T is `routed_tiles`.
    """
    (count, R, F), (E, D, _) = hidden_TRF.shape, down[0].shape
    dtype, weight_dtype = hidden_TRF.dtype, down[0].dtype
    depth = stage_depth(R, F)
    stages, ring_types = ring(R, depth, dtype, weight_dtype, WIDTH * R * dtype.itemsize)
    features, steps = D // WIDTH, F // depth

    def body(hidden, down, tiles, out, rows_s, weights_s, full, empty, out_s):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        wait_for_earlier(overlap)
        start_next(overlap)
        order = Order(tiles, routed_tiles, count - routed_tiles, E)
        own = pl.cdiv(order.count * features - block, blocks)
        stream = Stream(full, empty, stages)

        def place(turn, half):
            at = block + turn * blocks
            return order.find(lax.div(at, features)), pl.ds(lax.rem(at, features) * WIDTH + half * ROWS, ROWS)

        @pl.when(warpgroup == FETCHER)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                columns = pl.ds(lax.rem(step, steps) * depth, depth)
                for half in range(WARPGROUPS):
                    found, channels = place(lax.div(step, steps), half)
                    found.fetch(down, channels, columns, weights_s.at[half, slot], barrier)
                plgpu.copy_gmem_to_smem(hidden.at[found.stands, :, columns], rows_s.at[slot], barrier)

            stream.fill(own * steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, own)
            def _tile(turn):
                found, channels = place(turn, warpgroup)
                scale = found.scale(down, channels)
                out_DR = products(stream, weights_s.at[warpgroup], rows_s, turn * steps, (turn + 1) * steps)
                out_DR = plgpu.layout_cast(scaled(out_DR, scale).astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left its buffer
                out_s.at[warpgroup].transpose((1, 0))[...] = out_DR
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out.at[found.stands, :, channels])

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, R, D), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=FETCHER + 1,
        thread_name="warpgroup",
        scratch_types=[*ring_types, shared_tile((WARPGROUPS, R, ROWS), dtype)],
        compiler_params=PARAMS,
        interpret=interpret,
    )(hidden_TRF, down, tiles)


def places_of_all(rows: int, tile: int, routed_tiles: int) -> jax.Array:
    """Where the shared expert's results for rows [M] stand among all places, behind those of the routed tiles."""
    row_M = jnp.arange(rows)
    last = rows // tile * tile if rows % tile else rows  # the first row of a last tile that is not full
    return routed_tiles * tile + row_M + jnp.where(row_M >= last, -rows % tile, 0)


class Order:
    """In which order tiles are worked on: last those of the shared expert, whose weights come from the L2 cache."""

    def __init__(self, tiles: Tiles, routed_tiles: int, shared_tiles: int, experts: int):
        self.ids, self.routed_tiles, self.shared_tiles, self.experts = tiles.ids_T, routed_tiles, shared_tiles, experts
        self.routed = tiles.upto_E[tiles.upto_E.shape[0] - 1]  # those that exist
        self.count = self.routed + shared_tiles

    def find(self, place) -> "Found":
        """The tile that comes at a place of the order."""
        if not self.shared_tiles:
            return Found(self, place, False)
        is_shared = place >= self.routed
        return Found(self, place - jnp.where(is_shared, self.routed, 0), is_shared)


class Found:
    """A tile, by its number among the routed ones or among the shared expert's; where it `stands` among all."""

    def __init__(self, order: Order, number, is_shared):
        self.number, self.is_shared = number, is_shared
        self.stands = number + jnp.where(is_shared, order.routed_tiles, 0)
        own = order.ids[jnp.where(is_shared, 0, number)]
        self.expert = jnp.clip(own, 0, order.experts - 1)  # any of them where the tile is the shared one's

    def when_routed(self, function) -> None:
        function() if self.is_shared is False else pl.when(~self.is_shared)(function)

    def when_shared(self, function) -> None:
        if self.is_shared is not False:
            pl.when(self.is_shared)(function)

    def fetch(self, matrix, channels, columns, into, barrier) -> None:
        """Starts to copy the tile's expert's part of a matrix, routed and shared."""
        routed, shared = matrix

        @self.when_routed
        def _routed():
            plgpu.copy_gmem_to_smem(values_of(routed).at[self.expert, channels, columns], into, barrier)

        @self.when_shared
        def _shared():
            plgpu.copy_gmem_to_smem(values_of(shared).at[channels, columns], into, barrier)

    def scale(self, matrix, channels):
        routed, shared = matrix
        return load_scale(routed, self.expert, shared, jnp.where(self.is_shared, 1.0, 0.0), channels)
