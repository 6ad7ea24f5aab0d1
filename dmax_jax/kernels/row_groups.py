"""Rows brought together by the expert that they chose, in tiles of R rows, for `grouped_experts`.

An expert's rows, in their order, fill tiles of its own; those of an expert stand after those of the experts before it.
Nothing is sorted: one kernel counts an expert's rows, another copies every row to its places.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.active_experts import THREADS, WARP, sum_in_warp
from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.hopper import scatter
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier

AT_ONCE = 8  # times 128 rows that are counted together
PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)  # those around shared memory are written out
BY_THREAD = plgpu.Layout.TCGEN05_TMEM_NATIVE(1).reduce(1)  # every thread has one of 128 entries


@struct.dataclass
class Tiles:
    """Those of the experts up to e are the first `upto_E[e]`, and `ids_T` says whose each is."""

    ids_T: jax.Array
    upto_E: jax.Array


@struct.dataclass
class Groups:
    """T tiles of R rows, and what stands in them.

    What belongs to tiles past the last one, or to places without a row, is not written. E may be filled up. Weights and
    ids are followed by numbers of no consequence.
    """

    rows_TRD: jax.Array
    weights_P: jax.Array  # of what stands at the T R places, in its expert
    tiles: Tiles
    places_MX: jax.Array  # of every row's copies among the T R places; -1 where it has fewer experts


def group_rows(x_MD: jax.Array, choice: Choice, tile: int, *, experts_per_row: int, interpret: bool = False) -> Groups:
    """Groups rows [M, D] in tiles of `tile` rows on a Hopper GPU. A row chose at most `experts_per_row` experts."""
    D, E, pairs = x_MD.shape[1], choice.weights_ME.shape[1], len(x_MD) * experts_per_row
    T = min(E, pairs) + pairs // tile
    fill = 0, -E % THREADS  # nothing to do for 256
    columns_EM = jnp.pad(choice.columns_EM, (fill, (0, -choice.columns_EM.shape[1] % THREADS)))
    ranks_EM, counts_E = count_rows(columns_EM, interpret=interpret)
    weights_ME = jnp.pad(choice.weights_ME, ((0, 0), fill))
    rows_PD, weights_P, ids_T, upto_E, places_ME = place_rows(
        x_MD, weights_ME, ranks_EM, counts_E, tiles=T, tile=tile, experts_per_row=experts_per_row, interpret=interpret
    )
    return Groups(rows_PD.reshape(T, tile, D), weights_P, Tiles(ids_T, upto_E), places_ME[:, :experts_per_row])


@kernel()
def count_rows(columns_EM, *, interpret=False, overlap=False) -> tuple[jax.Array, jax.Array]:
    """For every row how many rows before it have a weight above 0 in the expert [E, M], and how many have one [E].

    A block of threads has an expert; M is a multiple of 128.
    """
    E, M = columns_EM.shape
    together = math.gcd(M // THREADS, AT_ONCE)

    def body(columns, ranks, counts, upto_s):
        expert = lax.axis_index("column")
        wait_for_earlier(overlap)
        start_next(overlap)

        def count(step, before):
            starts = [(step * together + number) * THREADS for number in range(together)]
            taken = [flags(load(columns, (expert, pl.ds(start, THREADS)))) for start in starts]
            upto, total = sums_up_to(taken, upto_s)
            for start, taken_C, upto_C in zip(starts, taken, upto, strict=True):
                ranks[expert, pl.ds(start, THREADS)] = before + upto_C - taken_C
            return before + total

        counts[expert] = lax.fori_loop(0, M // THREADS // together, count, 0)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((E, M), jnp.int32), jax.ShapeDtypeStruct((E,), jnp.int32)],
        grid=(E,),
        grid_names=("column",),
        scratch_types=[plgpu.SMEM((together * THREADS,), jnp.int32)],
        compiler_params=PARAMS,
        interpret=interpret,
    )(columns_EM)


@kernel("tiles", "tile", "experts_per_row")
def place_rows(
    x_MD, weights_ME, ranks_EM, counts_E, *, tiles: int, tile: int, experts_per_row: int, interpret=False, overlap=False
) -> tuple[jax.Array, ...]:
    """Copies rows to their places in `tiles` tiles of `tile` rows: what `Groups` has, but for what follows.

    A block of threads has a row. The places of a row are followed by -1 for the experts that it did not choose. What
    doesn't count is written behind weights and ids, by several blocks at a time. E is a multiple of 128.
    """
    (M, D), E = x_MD.shape, weights_ME.shape[1]
    starts = range(0, E, THREADS)
    last = tiles * tile
    strided = plgpu.Layout.WG_STRIDED((D,), math.gcd(D // THREADS, 8))

    def body(x, weights, ranks, counts, rows, placed_weights, ids, upto, places, upto_s, list_s):
        row = lax.axis_index("row")
        wait_for_earlier(overlap)
        start_next(overlap)
        own_row = jnp.minimum(row, M - 1)
        x_D = plgpu.load(x.at[own_row], layout=strided, optimized=False)  # all that it needs is on its way at once
        own_counts = [load(counts, pl.ds(start, THREADS)) for start in starts]
        own_weights = [load(weights, (own_row, pl.ds(start, THREADS))) for start in starts]
        own_ranks = [load(ranks, (pl.ds(start, THREADS), own_row)) for start in starts]
        experts = [plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD) + start for start in starts]
        own_tiles = [lax.div(counts_C + (tile - 1), tile) for counts_C in own_counts]
        taken = [flags(weights_C) for weights_C in own_weights]
        tiles_upto, _ = sums_up_to(own_tiles, upto_s)
        taken_upto, total = sums_up_to(taken, upto_s)

        @pl.when(row < tiles)
        def _tile():
            for expert_C, own_C, upto_C in zip(experts, own_tiles, tiles_upto, strict=True):
                is_own_C = (upto_C - own_C <= row) & (row < upto_C)
                scatter(ids, (jnp.where(is_own_C, row, tiles + expert_C),), expert_C, BY_THREAD)

        @pl.when(row == 0)
        def _upto():
            for start, upto_C in zip(starts, tiles_upto, strict=True):
                upto[pl.ds(start, THREADS)] = upto_C

        @pl.when(row < M)
        def _row():
            for number, expert_C in enumerate(experts):
                taken_C = taken[number]
                before_C = taken_upto[number] - taken_C
                first_C = (tiles_upto[number] - own_tiles[number]) * tile
                place_C = jnp.where(taken_C > 0, first_C + own_ranks[number], -1)
                stands_C = jnp.where(taken_C > 0, before_C, total + expert_C - before_C)
                scatter(list_s, (stands_C,), place_C, BY_THREAD)
                target_C = jnp.where(taken_C > 0, place_C, last + expert_C)
                scatter(placed_weights, (target_C,), own_weights[number], BY_THREAD)
            plgpu.commit_smem()
            for start in starts:
                own = pl.ds(start, THREADS)
                places[own_row, own] = plgpu.load(list_s.at[own], layout=BY_THREAD, optimized=False)
            for number in range(experts_per_row):
                place = list_s[number]

                @pl.when(place >= 0)
                def _copy():
                    rows[place] = x_D  # noqa: B023

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((last, D), x_MD.dtype),
            jax.ShapeDtypeStruct((last + E,), jnp.float32),
            jax.ShapeDtypeStruct((tiles + E,), jnp.int32),
            jax.ShapeDtypeStruct((E,), jnp.int32),
            jax.ShapeDtypeStruct((M, E), jnp.int32),
        ],
        grid=(max(M, tiles),),
        grid_names=("row",),
        scratch_types=[plgpu.SMEM((E,), jnp.int32)] * 2,
        compiler_params=PARAMS,
        interpret=interpret,
    )(x_MD, weights_ME, ranks_EM, counts_E)


def load(ref, at):
    return plgpu.load(ref.at[at], layout=BY_THREAD, optimized=False)


def flags(numbers_C):
    """1 where a number is above 0, else 0."""
    return jnp.where(numbers_C > 0, 1, 0)


def sums_up_to(numbers: list, upto_s) -> tuple[list, jax.Array]:
    """The running sums of chunks of 128 int32 that follow each other, one to a thread, and the sum of all.

    `upto_s` is shared memory for all of them.
    """
    within = [sum_in_warp(numbers_C, BY_THREAD) for numbers_C in numbers]
    plgpu.commit_smem()  # a barrier: what stood there has been read
    for number, within_C in enumerate(within):
        upto_s[pl.ds(number * THREADS, THREADS)] = within_C
    plgpu.commit_smem()
    thread_C = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)
    upto, before = [], 0
    for number, within_C in enumerate(within):
        upto_C = within_C + before
        for first in range(0, THREADS, WARP):
            total = upto_s[number * THREADS + first + WARP - 1]
            upto_C += jnp.where(thread_C >= first + WARP, total, 0)
            before += total
        upto.append(upto_C)
    return upto, before
