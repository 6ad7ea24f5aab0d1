"""The routed experts of few rows: every expert that some row chose is read once, and multiplies all rows.

For at most 128 rows the weights' way from memory takes longer than the products with all rows, so nothing is sorted or
gathered: a row that did not choose an expert has weight 0 there. Weights are the left factor of the matrix units'
products, in the orientation of the checkpoint, and rows the right one, so what is between the kernels is transposed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.hopper import (
    ROWS,
    Stream,
    all_at_once,
    barriers,
    kernel,
    multiprocessors,
    shared_tile,
    signal,
    stages_that_fit,
    wait_for,
)
from dmax_jax.kernels.int8_tiles import load_scale, multiply, scaled, values_of
from dmax_jax.kernels.int8_weight import Int8Weight, Weight

MAX_ROWS = 128
WARPGROUPS = 2  # that multiply; one more fetches
PARAMS = plgpu.CompilerParams(approx_math=True)

Matrices = tuple[Weight, Weight, Weight]  # gate, up and down


def suits_kernels(x_MD: jax.Array, experts: Matrices) -> bool:
    """Whether dtype and sizes are those that the kernels work in."""
    _, F, D = experts[0].shape
    tile = WARPGROUPS * ROWS
    alike = {matrix.dtype for matrix in experts} in ({jnp.dtype("bfloat16")}, {jnp.dtype("int8")})
    return x_MD.dtype == jnp.bfloat16 and alike and D % tile == F % tile == 0


def can_stream(x_MD: jax.Array, experts: Matrices, shared: Matrices) -> bool:
    """Whether the rows are few, and the shared expert is like the others."""
    alike = all(a.shape[1:] == b.shape and a.dtype == b.dtype for a, b in zip(experts, shared, strict=True))
    return suits_kernels(x_MD, experts) and alike and len(x_MD) <= MAX_ROWS


def streamed_experts(
    x_MD: jax.Array,
    choice: Choice,
    experts: Matrices,
    shared: Matrices,
    *,
    blocks: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`routed_experts` on a Hopper GPU, by `blocks` blocks of threads (default: one per multiprocessor)."""
    M = x_MD.shape[0]
    rows = max(16, 1 << (M - 1).bit_length())
    x_MD = jnp.pad(x_MD, ((0, rows - M), (0, 0)))
    inputs = x_MD, tuple(experts), tuple(shared), counters_and_ids(choice.upto_E), choice.upto_E, choice.columns_EM
    parts_PMD = expert_sums(*inputs, blocks=blocks or multiprocessors(), interpret=interpret)
    return jnp.sum(parts_PMD, axis=0)[:M].astype(x_MD.dtype)


@kernel("blocks")
def expert_hidden(x_GMD, routed, shared, ids_T, upto, weights, *, blocks: int, interpret=False) -> jax.Array:
    """silu(gate x) * (up x) * weight for every listed expert and its rows: [T + 1, F, M]; M is 16, 32, 64 or 128.

    `routed` and `shared` are gate and up. With G = 1 all experts have the same rows, the weights are `[E, >= M]`, and
    the shared expert stands behind the listed ones. With G = T (`shared` None) the t-th listed expert, of which there
    may be several, has the t-th rows and weights `[T, M]`. Blocks of threads walk over tiles of (expert, 64 features)
    in turn: one warpgroup multiplies by gate, one by up. The last of `upto` is the number of listed experts.
    """
    (G, M, D), (E, F, _), T = x_GMD.shape, routed[0].shape, len(ids_T)
    dtype, weight_dtype = x_GMD.dtype, routed[0].dtype
    depth = stage_depth(M, D, weight_dtype)
    tiles, steps = F // ROWS, D // depth
    exchange_bytes = ROWS * M * (4 + dtype.itemsize)
    stages = stages_that_fit((2 * ROWS * weight_dtype.itemsize + M * dtype.itemsize) * depth, exchange_bytes)

    def body(x, routed, shared, ids, upto, weights, out, x_s, gate_s, up_s, raised_s, out_s, *barriers):
        full, empty, raised_full, raised_empty = barriers
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = upto[upto.shape[0] - 1]
        own = pl.cdiv((count + (1 if shared else 0)) * tiles - block, blocks)  # tiles of this block
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return lax.div(at, tiles), lax.rem(at, tiles)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                listed, feature = place(lax.div(step, steps))
                expert = expert_at(ids, listed, E)
                features = pl.ds(feature * ROWS, ROWS)
                columns = pl.ds(lax.rem(step, steps) * depth, depth)
                plgpu.copy_gmem_to_smem(x.at[0 if G == 1 else listed, :, columns], x_s.at[slot], barrier)

                def fetch(matrices, *which):
                    for matrix, matrix_s in zip(matrices, (gate_s, up_s), strict=True):
                        columns_of = values_of(matrix).at[*which, features, columns]
                        plgpu.copy_gmem_to_smem(columns_of, matrix_s.at[slot], barrier)

                if not shared:
                    fetch(routed, expert)
                    return

                @pl.when(listed < count)
                def _routed():
                    fetch(routed, expert)

                @pl.when(listed == count)
                def _shared():
                    fetch(shared)

            stream.fill(own * steps, load)

        def share_of(listed):
            return jnp.where(listed == count, 1.0, 0.0)  # of the shared expert, whose weight is 1

        def product(turn, matrix, weights_s):
            listed, feature = place(turn)
            own_shared = shared and shared[matrix]
            channels = pl.ds(feature * ROWS, ROWS)
            scale = load_scale(routed[matrix], expert_at(ids, listed, E), own_shared, share_of(listed), channels)

            def multiply_all(total):
                @pl.loop(0, steps)
                def _step(step):
                    stream.use(
                        turn * steps + step,
                        lambda slot: multiply(total, weights_s.at[slot], x_s.at[slot].transpose((1, 0))),
                    )

                return total[...]

            return scaled(pl.run_scoped(multiply_all, plgpu.ACC((ROWS, M), jnp.float32)), scale)

        @pl.when(warpgroup == 1)
        def _raise():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, own)
            def _tile(turn):
                raised = product(turn, 1, up_s)

                @pl.when(turn > 0)
                def _wait():
                    plgpu.barrier_wait(raised_empty)

                raised_s[...] = raised
                plgpu.barrier_arrive(raised_full)

            @pl.when(own > 0)
            def _last():
                plgpu.barrier_wait(raised_empty)

        @pl.when(warpgroup == 0)
        def _gate():
            plgpu.set_max_registers(232, action="increase")

            @pl.loop(0, own)
            def _tile(turn):
                listed, feature = place(turn)
                row = expert_at(ids, listed, E) if G == 1 else listed
                weight_M = plgpu.load(
                    weights.at[row, pl.ds(0, M)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                )
                if shared:
                    share = share_of(listed)
                    weight_M = weight_M * (1 - share) + share
                gated = product(turn, 0, gate_s)
                plgpu.barrier_wait(raised_full)
                raised = plgpu.load(raised_s, layout=plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(raised_empty)
                hidden = gated / (1 + jnp.exp(-gated)) * raised * lax.broadcast_in_dim(weight_M, (ROWS, M), [1])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left its buffer
                out_s[...] = hidden.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s, out.at[listed, pl.ds(feature * ROWS, ROWS)])

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T + 1, F, M), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((stages, M, depth), dtype),
            shared_tile((stages, ROWS, depth), weight_dtype),
            shared_tile((stages, ROWS, depth), weight_dtype),
            shared_tile((ROWS, M), jnp.float32),
            shared_tile((ROWS, M), dtype),
            *barriers(copies=3, warpgroups=WARPGROUPS, stages=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(x_GMD, routed, shared, ids_T, upto, weights)


@kernel("blocks")
def expert_sums(x_MD, experts, shared, lists_L, upto_E, weights_EM, *, blocks: int, interpret=False):
    """Sums the weighted SwiGLU outputs of the listed experts and the shared one, in P parts to be added: [P, M, D].

    The parts are float32; M is 16, 32, 64 or 128. Two phases in one kernel, so that memory never idles between them: all
    blocks of threads walk over tiles of (expert, 64 features) for gate and up, and then have a tile of 128 output
    features and some of the experts for down. The counters before the ids in `lists_L` say how many tiles of each two
    experts are done, which down waits for. All blocks must run at once, one per multiprocessor; as each first makes its tiles,
    waiting for nobody, all waiting ends.
    """
    (M, D), (E, F, _) = x_MD.shape, experts[0].shape
    dtype, weight_dtype, width = x_MD.dtype, experts[0].dtype, WARPGROUPS * ROWS
    depth = math.gcd(stage_depth(M, D, weight_dtype), F)
    tiles, hidden_steps, out_steps = F // ROWS, D // depth, F // depth
    features = D // width
    parts = blocks // features
    stage_bytes = (width * weight_dtype.itemsize + M * dtype.itemsize) * depth
    stages = stages_that_fit(stage_bytes, ROWS * M * (4 + dtype.itemsize))

    def body(x, experts, shared, upto, weights, lists, out, hidden, rows_s, weights_s, raised_s, out_s, *barriers):
        full, empty, raised_full, raised_empty = barriers
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        ids = lists.at[pl.ds(lists.shape[0] - E, E)]
        count = upto[E - 1]
        active = count + 1
        turns = pl.cdiv(active * tiles - block, blocks)  # tiles of this block
        first = turns * hidden_steps  # the step at which down begins
        part, feature = lax.div(block, features), lax.rem(block, features)
        deal = Deal(active, tiles, blocks, features, D // F, block)
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return lax.div(at, tiles), lax.rem(at, tiles)

        def done(listed):
            return lists.at[lax.div(listed, 2)]

        @pl.when(warpgroup == WARPGROUPS)
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
                def _hidden():
                    listed, tile = place(lax.div(step, hidden_steps))
                    columns = pl.ds(lax.rem(step, hidden_steps) * depth, depth)
                    plgpu.copy_gmem_to_smem(x.at[:, columns], rows_s.at[slot], barrier)
                    for half in range(WARPGROUPS):
                        fetch(half, half, listed, tile * ROWS, columns)

                @pl.when(step >= first)
                def _out():
                    step_out = step - first
                    listed = deal.listed(lax.div(step_out, out_steps))
                    columns = pl.ds(lax.rem(step_out, out_steps) * depth, depth)
                    for half in range(WARPGROUPS):
                        fetch(2, half, listed, feature * width + half * ROWS, columns)

                    @pl.when(lax.rem(step_out, out_steps) == 0)
                    def _wait():
                        wait_for(done(listed), jnp.minimum(active - lax.div(listed, 2) * 2, 2) * tiles)

                    plgpu.copy_gmem_to_smem(hidden.at[listed, :, columns], rows_s.at[slot], barrier)

            stream.fill(first + deal.items * out_steps, load)

        def share_of(listed):
            return jnp.where(listed == count, 1.0, 0.0)  # of the shared expert, whose weight is 1

        def scale_of(matrix, listed, start):
            expert, channels = expert_at(ids, listed, E), pl.ds(start, ROWS)
            return load_scale(experts[matrix], expert, shared[matrix], share_of(listed), channels)

        def products(half, start, stop):
            """The sum over steps of this half of the weights times the rows."""

            def multiply_all(total):
                @pl.loop(start, stop)
                def _step(step):
                    stream.use(
                        step, lambda slot: multiply(total, weights_s.at[half, slot], rows_s.at[slot].transpose((1, 0)))
                    )

                return total[...]

            return pl.run_scoped(multiply_all, plgpu.ACC((ROWS, M), jnp.float32))

        def product(turn, matrix):
            listed, tile = place(turn)
            scale = scale_of(matrix, listed, tile * ROWS)
            return scaled(products(matrix, turn * hidden_steps, (turn + 1) * hidden_steps), scale)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            @pl.when(warpgroup == 1)
            def _raise():
                @pl.loop(0, turns)
                def _tile(turn):
                    raised = product(turn, 1)

                    @pl.when(turn > 0)
                    def _wait():
                        plgpu.barrier_wait(raised_empty)

                    raised_s[...] = raised
                    plgpu.barrier_arrive(raised_full)

                @pl.when(turns > 0)
                def _last():
                    plgpu.barrier_wait(raised_empty)

            @pl.when(warpgroup == 0)
            def _gate():
                @pl.loop(0, turns)
                def _tile(turn):
                    listed, tile = place(turn)
                    share = share_of(listed)
                    weights_M = weights.at[expert_at(ids, listed, E), pl.ds(0, M)]
                    weight_M = plgpu.load(weights_M, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                    weight_M = weight_M * (1 - share) + share
                    gated = product(turn, 0)
                    plgpu.barrier_wait(raised_full)
                    raised = plgpu.load(raised_s, layout=plgpu.Layout.WGMMA)
                    plgpu.barrier_arrive(raised_empty)
                    hidden_FM = gated / (1 + jnp.exp(-gated)) * raised * lax.broadcast_in_dim(weight_M, (ROWS, M), [1])
                    hidden_FM = plgpu.layout_cast(hidden_FM.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    out_s.transpose((1, 0))[...] = hidden_FM
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s, hidden.at[listed, :, pl.ds(tile * ROWS, ROWS)])
                    plgpu.wait_smem_to_gmem(0)
                    signal(done(listed))

            @pl.when(part < parts)
            def _lower():
                def add_scaled(turn, total_DM):
                    scale = scale_of(2, deal.listed(turn), feature * width + warpgroup * ROWS)
                    start = first + turn * out_steps
                    return total_DM + scaled(products(warpgroup, start, start + out_steps), scale)

                if isinstance(experts[2], Int8Weight):
                    nothing_DM = plgpu.layout_cast(jnp.zeros((ROWS, M), jnp.float32), plgpu.Layout.WGMMA)
                    total_DM = lax.fori_loop(0, deal.items, add_scaled, nothing_DM)
                else:
                    total_DM = products(warpgroup, first, first + deal.items * out_steps)
                total_DM = plgpu.layout_cast(total_DM, plgpu.Layout.WGMMA_TRANSPOSED)
                out.at[part, :, pl.ds(feature * width + warpgroup * ROWS, ROWS)].transpose((1, 0))[...] = total_DM

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((parts, M, D), jnp.float32),
            jax.ShapeDtypeStruct((E + 1, M, F), dtype),
        ),
        **all_at_once(blocks, interpret=interpret),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((stages, M, depth), dtype),
            shared_tile((WARPGROUPS, stages, ROWS, depth), weight_dtype),
            shared_tile((ROWS, M), jnp.float32),
            shared_tile((M, ROWS), dtype),
            *barriers(copies=3, warpgroups=WARPGROUPS, stages=stages),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(x_MD, experts, shared, upto_E, weights_EM, jax.new_ref(lists_L))[0]


def counters_and_ids(upto_E: jax.Array) -> jax.Array:
    """The list of active experts, and before it zeros for `expert_sums` to count in.

    Made like the list, they need no program of their own: up to the places before the first, no expert is active.
    """
    E = len(upto_E)
    places_L = jnp.arange(-(E // 2 + 1), E)
    return jnp.sum(upto_E[None] <= places_L[:, None], axis=1, dtype=jnp.int32)


class Deal:
    """Which of the `active` experts a block of threads multiplies by its part of down, and in which order.

    Blocks that had a tile less before take `extra` experts first, which are as much to read as a tile. The others are
    dealt to all blocks of the same features in turn, in the order in which they were made.
    """

    def __init__(self, active, tiles: int, blocks: int, features: int, extra: int, block):
        part, feature = lax.div(block, features), lax.rem(block, features)
        self.parts, self.part = blocks // features, part
        with_more = jnp.minimum(lax.rem(active * tiles, blocks), self.parts * features)
        long = pl.cdiv(with_more - feature, features)  # parts of these features that have had a tile more
        self.short = jnp.maximum(self.parts - long, 1)
        self.place = part - long
        self.lead = jnp.minimum((self.parts - long) * extra, active)  # dealt to the short ones
        own_lead = jnp.where(self.place >= 0, pl.cdiv(self.lead - self.place, self.short), 0)
        self.own_lead = jnp.maximum(own_lead, 0)
        own_rest = jnp.maximum(pl.cdiv(active - self.lead - part, self.parts), 0)
        self.items = jnp.where(part < self.parts, self.own_lead + own_rest, 0)

    def listed(self, turn):
        later = self.lead + (turn - self.own_lead) * self.parts + self.part
        return jnp.where(turn < self.own_lead, turn * self.short + self.place, later)


def stage_depth(rows: int, columns: int, dtype: jnp.dtype) -> int:
    """Columns of the weights in a stage: few large copies, if the rows leave room for several stages."""
    together = 128 // dtype.itemsize
    return math.gcd(2 * together if rows <= 32 * dtype.itemsize else together, columns)


def expert_at(ids, place: jax.Array, experts: int) -> jax.Array:
    """The expert that stands at a place of the list; any expert past its end, where the shared one is."""
    return jnp.minimum(ids[jnp.minimum(place, ids.shape[0] - 1)], experts - 1)
