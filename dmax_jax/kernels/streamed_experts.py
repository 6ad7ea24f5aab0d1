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
from dmax_jax.kernels.hopper import ROWS, Stream, barriers, kernel, multiprocessors, shared_tile, stages_that_fit
from dmax_jax.kernels.quantised_tiles import load_scale, multiply, scaled, values_of
from dmax_jax.kernels.quantised_weight import KINDS, QuantisedWeight, Weight

MAX_ROWS = 128
WARPGROUPS = 2  # that multiply; one more fetches
PARAMS = plgpu.CompilerParams(approx_math=True)

Matrices = tuple[Weight, Weight, Weight]  # gate, up and down


def suits_kernels(x_MD: jax.Array, experts: Matrices) -> bool:
    """Whether dtype and sizes are those that the kernels work in."""
    _, F, D = experts[0].shape
    tile = WARPGROUPS * ROWS
    alike = {matrix.dtype for matrix in experts} in [{dtype} for dtype in (x_MD.dtype, *KINDS.values())]
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
    tiles = choice.ids_E, choice.upto_E
    how = {"blocks": blocks or multiprocessors(), "interpret": interpret}
    hidden_AFM = expert_hidden(x_MD[None], experts[:2], shared[:2], *tiles, choice.columns_EM, **how)
    parts_PMD = expert_outputs(hidden_AFM, experts[2], shared[2], *tiles, **how)
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
                        lambda slot: multiply(
                            total, weights_s.at[slot], x_s.at[slot].transpose((1, 0)), interpret=interpret
                        ),
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
def expert_outputs(hidden_AFM, down_EDF, shared_down_DF, ids_E, upto_E, *, blocks: int, interpret=False) -> jax.Array:
    """Sums down hidden over the listed experts and the shared one, in P parts that are left to be added: [P, M, D].

    The parts are float32. A block of threads has 128 output features and every P-th expert.
    """
    (_, F, M), (E, D, _) = hidden_AFM.shape, down_EDF.shape
    dtype, weight_dtype, tile = hidden_AFM.dtype, down_EDF.dtype, WARPGROUPS * ROWS
    depth = stage_depth(M, F, weight_dtype)
    steps, parts = F // depth, max(1, blocks // (D // tile))
    stages = stages_that_fit((tile * weight_dtype.itemsize + M * dtype.itemsize) * depth, tile * M * 4)

    def body(hidden, down, shared_down, ids, upto, out, hidden_s, down_s, out_s, full, empty):
        warpgroup, part = lax.axis_index("warpgroup"), lax.axis_index("part")
        first = lax.axis_index("feature") * tile
        count = upto[upto.shape[0] - 1]
        own = pl.cdiv(count + 1 - part, parts)  # experts of this block
        own_steps = own * steps
        stream = Stream(full, empty, stages)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                listed = part + lax.div(step, steps) * parts
                is_shared = listed == count
                expert = expert_at(ids, listed, E)
                columns = pl.ds(lax.rem(step, steps) * depth, depth)
                plgpu.copy_gmem_to_smem(hidden.at[listed, columns], hidden_s.at[slot], barrier)

                @pl.when(~is_shared)
                def _routed():
                    features = values_of(down).at[expert, pl.ds(first, tile), columns]
                    plgpu.copy_gmem_to_smem(features, down_s.at[slot], barrier)

                @pl.when(is_shared)
                def _shared():
                    features = values_of(shared_down).at[pl.ds(first, tile), columns]
                    plgpu.copy_gmem_to_smem(features, down_s.at[slot], barrier)

            stream.fill(own_steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            rows = pl.ds(warpgroup * ROWS, ROWS)

            def products(start, stop):
                def multiply_all(total):
                    @pl.loop(start, stop)
                    def _step(step):
                        stream.use(
                            step,
                            lambda slot: multiply(total, down_s.at[slot, rows], hidden_s.at[slot], interpret=interpret),
                        )

                    return total[...]

                return pl.run_scoped(multiply_all, plgpu.ACC((ROWS, M), jnp.float32))

            def add_scaled(turn, total_DM):
                listed = part + turn * parts
                share = jnp.where(listed == count, 1.0, 0.0)
                channels = pl.ds(first + warpgroup * ROWS, ROWS)
                scale = load_scale(down, expert_at(ids, listed, E), shared_down, share, channels)
                return total_DM + scaled(products(turn * steps, (turn + 1) * steps), scale)

            if isinstance(down, QuantisedWeight):
                nothing_DM = plgpu.layout_cast(jnp.zeros((ROWS, M), jnp.float32), plgpu.Layout.WGMMA)
                total_DM = lax.fori_loop(0, own, add_scaled, nothing_DM)
            else:
                total_DM = products(0, own_steps)
            total_DM = plgpu.layout_cast(total_DM, plgpu.Layout.WGMMA_TRANSPOSED)
            out_s.at[warpgroup].transpose((1, 0))[...] = total_DM
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out.at[part, :, pl.ds(first + warpgroup * ROWS, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    row_bytes = 128 if weight_dtype != dtype else M * dtype.itemsize
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, M, D), jnp.float32),
        grid=(D // tile, parts),
        grid_names=("feature", "part"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((stages, depth, M), dtype),
            shared_tile((stages, tile, depth), weight_dtype, row_bytes=row_bytes),
            shared_tile((WARPGROUPS, M, ROWS), jnp.float32),
            *barriers(copies=2, warpgroups=WARPGROUPS, stages=stages),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(hidden_AFM, down_EDF, shared_down_DF, ids_E, upto_E)


def stage_depth(rows: int, columns: int, dtype: jnp.dtype) -> int:
    """Columns of the weights in a stage: few large copies, if the rows leave room for several stages."""
    together = 128 // dtype.itemsize
    return math.gcd(2 * together if rows <= 32 * dtype.itemsize else together, columns)


def expert_at(ids, place: jax.Array, experts: int) -> jax.Array:
    """The expert that stands at a place of the list; any expert past its end, where the shared one is."""
    return jnp.minimum(ids[jnp.minimum(place, ids.shape[0] - 1)], experts - 1)
