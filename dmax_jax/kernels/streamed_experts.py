"""The routed experts of few rows: every expert that some row chose is read once, and multiplies all rows.

For at most 64 rows the weights' way from memory takes longer than the products with all rows, so nothing is sorted or
gathered: a row that did not choose an expert has weight 0 there. One kernel makes all of it, so that memory doesn't
idle while some blocks of threads have finished gate and up and others haven't.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.active_experts import THREADS, SharedList
from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.expert_tiles import (
    FETCHER,
    PARAMS,
    WARPGROUPS,
    WIDTH,
    WRITER,
    Matrices,
    are_alike,
    exchange,
    exchange_bytes,
    expert_at,
    make_hidden,
    per_row,
    products,
    ring,
    stage_depth,
    suits_kernels,
    write_hidden,
)
from dmax_jax.kernels.hopper import ROWS, Stream, all_at_once, filled_up, multiprocessors, signal, wait_for
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier
from dmax_jax.kernels.quantised_tiles import load_scale, scaled, values_of
from dmax_jax.kernels.quantised_weight import QuantisedWeight
from dmax_jax.kernels.row_digits import MOST_ROWS, Digits, in_digits, joined

FEW_ROWS = 64  # 128 rows, all multiplied by all experts, took longer than 256 grouped ones
GROUP = 32  # experts whose tiles are counted together: looking at a counter takes longer than fetching a stage


def can_stream(x_MD: jax.Array, experts: Matrices, shared: Matrices) -> bool:
    """Whether the rows are few, the shared expert is like the others, and down's features are not too many."""
    enough_blocks = x_MD.shape[1] // WIDTH <= multiprocessors()
    few = len(x_MD) <= FEW_ROWS
    return suits_kernels(x_MD, experts) and are_alike(experts, shared) and few and enough_blocks


def streamed_experts(
    x_MD: jax.Array,
    choice: Choice,
    experts: Matrices,
    shared: Matrices,
    digits: Digits | None = None,
    *,
    blocks: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`routed_experts` on a Hopper GPU, by `blocks` blocks of threads (default: one per multiprocessor)."""
    M, E = choice.weights_ME.shape
    rows = jnp.pad(x_MD, ((0, filled_up(M) - M), (0, 0))) if digits is None else digits
    if digits is None and multiplies_digits(len(rows), experts):
        rows = in_digits(rows)
    weights_ML = jnp.pad(choice.weights_ME, ((0, 0), (0, -E % (WARPGROUPS * THREADS))))  # nothing to do for 256
    inputs = rows, tuple(experts), tuple(shared), weights_ML, choice.columns_EM, choice.zeros_E
    blocks, dtype = blocks or multiprocessors(), x_MD.dtype
    return expert_sums(*inputs, blocks=blocks, dtype=dtype, interpret=interpret)[:, :M]


def multiplies_digits(rows: int, experts: Matrices) -> bool:
    """Whether gate and up multiply the rows' digits."""
    return experts[0].dtype == jnp.int8 and rows <= MOST_ROWS


@kernel("blocks", "dtype")
def expert_sums(
    rows,
    experts,
    shared,
    weights_ML,
    columns_EM,
    zeros_E,
    *,
    blocks: int,
    dtype: jnp.dtype,
    interpret=False,
    overlap=False,
) -> jax.Array:
    """Sums the weighted SwiGLU outputs of the active experts and the shared one, in P parts to be added: [P, M, D].

    The parts are float32; M is 16, 32 or 64, of which the rows' weights may have fewer. `weights_ML` is filled up
    with experts of weight 0 to a multiple of 256. First, every block of threads lists the active experts for itself.
    Then, blocks walk over tiles of (expert, 64 features) of gate and up, and after that each one multiplies some of the
    experts by 128 features of down. `zeros_E` count the tiles of every 32 listed experts that are done, which down
    waits for. So all blocks have to run at once: at most one per multiprocessor, no other such kernel beside it (nor
    another process's, under MPS), no vmap. As every block makes its tiles before it waits for another's, all of them
    are made.

    `rows` are [M, D] in `dtype`, that of the hidden features, or Digits, which gate and up in int8 multiply, so that
    none of their weights is converted. Down's are, as no block has seen the largest magnitude of the hidden features
    that it would take digits of.
    """
    M, (E, F, D), weight_dtype = columns_EM.shape[1], experts[0].shape, experts[0].dtype
    depth = math.gcd(stage_depth(M, D), F)
    other_types = [*exchange(M, dtype), *SharedList.scratch(WARPGROUPS, weights_ML.shape[1])]
    other_bytes = exchange_bytes(M, dtype) + SharedList.scratch_bytes(weights_ML.shape[1])
    stages, ring_types = ring(M, depth, dtype, weight_dtype, other_bytes, isinstance(rows, Digits))
    tiles, features = F // ROWS, D // WIDTH
    hidden_steps, out_steps = D // depth, F // depth
    parts = blocks // features
    if parts == 0:
        raise ValueError(f"{blocks=} are too few for {D=}: every {WIDTH} features need one")

    def body(
        x, experts, shared, weights, weight_columns, counters, out, hidden, rows_s, weights_s, full, empty, *others
    ):  # fmt: skip
        rows_s, x_s = rows_s if isinstance(x, Digits) else (rows_s, rows_s)  # of down, of gate and up
        x, largest = (x.values, x.largest) if isinstance(x, Digits) else (x, None)
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        wait_for_earlier(overlap)
        start_next(overlap)
        exchanged, listing = others[:-4], SharedList(WARPGROUPS, *others[-4:])
        pl.when(warpgroup < WARPGROUPS)(lambda: listing.make(weights))
        count, ids = listing.wait(), listing.ids
        active = count + 1  # with the shared one, which stands behind the listed ones
        part, feature = lax.div(block, features), lax.rem(block, features)
        turns = pl.cdiv(active * tiles - block, blocks)  # tiles of this block
        deal = Deal(active, tiles, blocks, features, D // F, block)
        first = turns * hidden_steps  # the step at which down begins
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return lax.div(at, tiles), lax.rem(at, tiles) * ROWS

        def done(group):
            return counters.at[group]

        @pl.when(warpgroup == WRITER)
        def _write():
            plgpu.set_max_registers(40, action="decrease")

            def target(turn):
                listed, start = place(turn)
                return hidden.at[listed, :, pl.ds(start, ROWS)]

            write_hidden(turns, target, lambda turn: signal(done(lax.div(place(turn)[0], GROUP))), exchanged)

        @pl.when(warpgroup == FETCHER)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                def fetch(matrix, half, listed, start, columns):
                    rows, half_s = pl.ds(start, ROWS), weights_s.at[half, slot]

                    @pl.when(listed < count)
                    def _routed():
                        own = values_of(experts[matrix]).at[expert_at(ids, listed, E), rows, columns]
                        plgpu.copy_gmem_to_smem(own, half_s, barrier)

                    @pl.when(listed == count)
                    def _shared():
                        plgpu.copy_gmem_to_smem(values_of(shared[matrix]).at[rows, columns], half_s, barrier)

                @pl.when(step < first)
                def _gate_and_up():
                    listed, start = place(lax.div(step, hidden_steps))
                    columns = pl.ds(lax.rem(step, hidden_steps) * depth, depth)
                    plgpu.copy_gmem_to_smem(x.at[:, columns], x_s.at[slot], barrier)
                    for half in range(WARPGROUPS):
                        fetch(half, half, listed, start, columns)

                @pl.when(step >= first)
                def _down():
                    turn = lax.div(step - first, out_steps)
                    out_step = lax.rem(step - first, out_steps)
                    listed = deal.listed(turn)
                    group = lax.div(listed, GROUP)
                    is_new = (turn == 0) | (group != lax.div(deal.listed(turn - 1), GROUP))
                    columns = pl.ds(out_step * depth, depth)
                    for half in range(WARPGROUPS):
                        fetch(2, half, listed, feature * WIDTH + half * ROWS, columns)

                    @pl.when((out_step == 0) & is_new)
                    def _wait():
                        wait_for(done(group), jnp.minimum(active - group * GROUP, GROUP) * tiles)

                    plgpu.copy_gmem_to_smem(hidden.at[listed, :, columns], rows_s.at[slot], barrier)

            stream.fill(first + deal.items * out_steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(216, action="increase")

            def share_of(listed):
                return jnp.where(listed == count, 1.0, 0.0)  # of the shared expert, whose weight is 1

            def scale_of(matrix, listed, start):
                expert, channels = expert_at(ids, listed, E), pl.ds(start, ROWS)
                return load_scale(experts[matrix], expert, shared[matrix], share_of(listed), channels)

            largest_M = None if largest is None else per_row(largest, M)

            def product(turn, matrix):
                scale = scale_of(matrix, *place(turn))
                steps = turn * hidden_steps, (turn + 1) * hidden_steps
                sums = products(stream, weights_s.at[matrix], x_s, *steps)
                return scaled(sums if largest is None else joined(sums, largest_M), scale)

            def weights_of(turn):
                listed, _ = place(turn)
                share = share_of(listed)
                return per_row(weight_columns.at[expert_at(ids, listed, E)], M) * (1 - share) + share

            make_hidden(turns, product, weights_of, exchanged)
            own_s, own = weights_s.at[warpgroup], pl.ds(feature * WIDTH + warpgroup * ROWS, ROWS)

            def add_scaled(turn, total_DM):
                scale = scale_of(2, deal.listed(turn), feature * WIDTH + warpgroup * ROWS)
                start = first + turn * out_steps
                return total_DM + scaled(products(stream, own_s, rows_s, start, start + out_steps), scale)

            @pl.when(part < parts)
            def _down():
                if isinstance(experts[2], QuantisedWeight):
                    nothing_DM = plgpu.layout_cast(jnp.zeros((ROWS, M), jnp.float32), plgpu.Layout.WGMMA)
                    total_DM = lax.fori_loop(0, deal.items, add_scaled, nothing_DM)
                else:
                    total_DM = products(stream, own_s, rows_s, first, first + deal.items * out_steps)
                total_DM = plgpu.layout_cast(total_DM, plgpu.Layout.WGMMA_TRANSPOSED)
                out.at[part, :, own].transpose((1, 0))[...] = total_DM

    parts_type = jax.ShapeDtypeStruct((parts, M, D), jnp.float32)
    hidden_type = jax.ShapeDtypeStruct((E + 1, M, F), dtype)
    return plgpu.kernel(
        body,
        out_type=(parts_type, hidden_type),
        **all_at_once(blocks, interpret=interpret),
        num_threads=WRITER + 1,
        thread_name="warpgroup",
        scratch_types=[*ring_types, *other_types],
        compiler_params=PARAMS,
        interpret=interpret,
    )(rows, experts, shared, weights_ML, columns_EM, jax.new_ref(zeros_E))[0]


class Deal:
    """Which of the `active` experts a block of threads multiplies by its features of down, and in which order.

    Blocks that had a tile less of gate and up take `extra` experts first, for which they read as much as for a tile.
    The others are dealt to all blocks of the same features in turn, in the order in which they were made.
    """

    def __init__(self, active, tiles: int, blocks: int, features: int, extra: int, block):
        part, feature = lax.div(block, features), lax.rem(block, features)
        self.parts, self.part = blocks // features, part
        with_more = jnp.minimum(lax.rem(active * tiles, blocks), self.parts * features)
        long = pl.cdiv(with_more - feature, features)  # parts of these features that have had a tile more
        self.short = jnp.maximum(self.parts - long, 1)
        self.place = part - long
        self.lead = jnp.minimum((self.parts - long) * extra, active)  # dealt to the short ones
        self.own_lead = jnp.where(self.place >= 0, pl.cdiv(self.lead - self.place, self.short), 0)
        own_rest = pl.cdiv(active - self.lead - part, self.parts)
        self.items = jnp.where(part < self.parts, self.own_lead + own_rest, 0)

    def listed(self, turn):
        later = self.lead + (turn - self.own_lead) * self.parts + self.part
        return jnp.where(turn < self.own_lead, turn * self.short + self.place, later)
