"""The routed experts of few rows: every expert that some row chose is read once, and multiplies all rows.

For at most 128 rows the weights' way from memory takes longer than the products with all rows, so nothing is sorted or
gathered: a row that did not choose an expert has weight 0 there. Weights are the left factor of the matrix units'
products, in the orientation of the checkpoint, and rows the right one, so what is between the kernels is transposed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.hopper import ROWS, Stream, barriers, kernel, multiprocessors, shared_tile, stages_that_fit

MAX_ROWS = 128
WARPGROUPS = 2  # that multiply; one more fetches
PARAMS = plgpu.CompilerParams(approx_math=True)

Matrices = tuple[jax.Array, jax.Array, jax.Array]  # gate, up and down


def can_stream(x_MD: jax.Array, experts: Matrices, shared: Matrices) -> bool:
    """Whether dtype and shapes suit the kernels."""
    (M, D), (_, F, _) = x_MD.shape, experts[0].shape
    tile = WARPGROUPS * ROWS
    dtypes = {array.dtype for array in (x_MD, *experts, *shared)}
    return M <= MAX_ROWS and dtypes == {jnp.dtype("bfloat16")} and D % tile == F % tile == 0 and len(shared[0]) == F


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
    tiles = choice.ids_E, choice.count_1
    how = {"blocks": blocks or multiprocessors(), "interpret": interpret}
    hidden_AFM = expert_hidden(x_MD, experts[:2], shared[:2], *tiles, choice.columns_EM, **how)
    parts_PMD = expert_outputs(hidden_AFM, experts[2], shared[2], *tiles, **how)
    return jnp.sum(parts_PMD, axis=0)[:M].astype(x_MD.dtype)


@kernel("blocks")
def expert_hidden(x_MD, routed, shared, ids_E, count_1, weights_EM, *, blocks: int, interpret=False) -> jax.Array:
    """silu(gate x) * (up x) * weight of all rows in every expert: [E + 1, F, M]; M is 16, 32, 64 or 128.

    `routed` and `shared` are gate and up. The result has the listed experts in the order of the list, then the shared
    one. Blocks of threads walk over tiles of (expert, 128 features) in turn.
    """
    (M, D), (E, F, _) = x_MD.shape, routed[0].shape
    dtype, tile = x_MD.dtype, WARPGROUPS * ROWS
    tiles, steps = F // tile, D // ROWS
    stages = stages_that_fit((2 * tile + M) * ROWS * dtype.itemsize, tile * M * dtype.itemsize)

    def body(x, gate, up, shared_gate, shared_up, ids, count, weights, out, x_s, gate_s, up_s, out_s, full, empty):
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        own = pl.cdiv((count[0] + 1) * tiles - block, blocks)  # tiles of this block
        stream = Stream(full, empty, stages)

        def place(turn):
            at = block + turn * blocks
            return lax.div(at, tiles), lax.rem(at, tiles)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                listed, feature = place(lax.div(step, steps))
                is_shared = listed == count[0]
                expert = _expert_at(ids, listed)
                features = pl.ds(feature * tile, tile)
                columns = pl.ds(lax.rem(step, steps) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(x.at[:, columns], x_s.at[slot], barrier)

                @pl.when(~is_shared)
                def _routed():
                    plgpu.copy_gmem_to_smem(gate.at[expert, features, columns], gate_s.at[slot], barrier)
                    plgpu.copy_gmem_to_smem(up.at[expert, features, columns], up_s.at[slot], barrier)

                @pl.when(is_shared)
                def _shared():
                    plgpu.copy_gmem_to_smem(shared_gate.at[features, columns], gate_s.at[slot], barrier)
                    plgpu.copy_gmem_to_smem(shared_up.at[features, columns], up_s.at[slot], barrier)

            stream.fill(own * steps, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            own_rows = pl.ds(warpgroup * ROWS, ROWS)

            @pl.loop(0, own)
            def _tile(turn):
                listed, feature = place(turn)
                expert = _expert_at(ids, listed)
                weight_M = plgpu.load(
                    weights.at[expert, pl.ds(0, M)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                )
                share = jnp.where(listed == count[0], 1.0, 0.0)  # of the shared expert, whose weight is 1
                weight_M = weight_M * (1 - share) + share

                def products(gate_sum, up_sum):
                    @pl.loop(0, steps)
                    def _step(step):
                        def multiply(slot):
                            x_t = x_s.at[slot].transpose((1, 0))
                            plgpu.wgmma(gate_sum, gate_s.at[slot, own_rows], x_t)
                            plgpu.wgmma(up_sum, up_s.at[slot, own_rows], x_t)

                        stream.use(turn * steps + step, multiply)

                    return gate_sum[...], up_sum[...]

                accumulator = plgpu.ACC((ROWS, M), jnp.float32)
                gated, raised = pl.run_scoped(products, accumulator, accumulator)
                hidden = gated / (1 + jnp.exp(-gated)) * raised * lax.broadcast_in_dim(weight_M, (ROWS, M), [1])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left its buffer
                out_s[warpgroup] = hidden.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    out_s.at[warpgroup], out.at[listed, pl.ds(feature * tile + warpgroup * ROWS, ROWS)]
                )

            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((E + 1, F, M), dtype),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((stages, M, ROWS), dtype),
            shared_tile((stages, tile, ROWS), dtype),
            shared_tile((stages, tile, ROWS), dtype),
            shared_tile((WARPGROUPS, ROWS, M), dtype),
            *barriers(copies=3, warpgroups=WARPGROUPS, stages=stages),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(x_MD, *routed, *shared, ids_E, count_1, weights_EM)


@kernel("blocks")
def expert_outputs(hidden_AFM, down_EDF, shared_down_DF, ids_E, count_1, *, blocks: int, interpret=False) -> jax.Array:
    """Sums down hidden over the listed experts and the shared one, in P parts that are left to be added: [P, M, D].

    The parts are float32. A block of threads has 128 output features and every P-th expert.
    """
    (_, F, M), D = hidden_AFM.shape, down_EDF.shape[1]
    dtype, tile = hidden_AFM.dtype, WARPGROUPS * ROWS
    steps, parts = F // ROWS, max(1, blocks // (D // tile))
    stages = stages_that_fit((tile + M) * ROWS * dtype.itemsize, tile * M * 4)

    def body(hidden, down, shared_down, ids, count, out, hidden_s, down_s, out_s, full, empty):
        warpgroup, part = lax.axis_index("warpgroup"), lax.axis_index("part")
        first = lax.axis_index("feature") * tile
        own = pl.cdiv(count[0] + 1 - part, parts) * steps
        stream = Stream(full, empty, stages)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def load(step, slot, barrier):
                listed = part + lax.div(step, steps) * parts
                is_shared = listed == count[0]
                expert = _expert_at(ids, listed)
                columns = pl.ds(lax.rem(step, steps) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(hidden.at[listed, columns], hidden_s.at[slot], barrier)

                @pl.when(~is_shared)
                def _routed():
                    plgpu.copy_gmem_to_smem(down.at[expert, pl.ds(first, tile), columns], down_s.at[slot], barrier)

                @pl.when(is_shared)
                def _shared():
                    plgpu.copy_gmem_to_smem(shared_down.at[pl.ds(first, tile), columns], down_s.at[slot], barrier)

            stream.fill(own, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")

            def products(total):
                @pl.loop(0, own)
                def _step(step):
                    def multiply(slot):
                        plgpu.wgmma(total, down_s.at[slot, pl.ds(warpgroup * ROWS, ROWS)], hidden_s.at[slot])

                    stream.use(step, multiply)

                return total[...]

            total_DM = pl.run_scoped(products, plgpu.ACC((ROWS, M), jnp.float32))
            total_DM = plgpu.layout_cast(total_DM, plgpu.Layout.WGMMA_TRANSPOSED)
            out_s.at[warpgroup].transpose((1, 0))[...] = total_DM
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], out.at[part, :, pl.ds(first + warpgroup * ROWS, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    row_bytes = M * dtype.itemsize
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, M, D), jnp.float32),
        grid=(D // tile, parts),
        grid_names=("feature", "part"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((stages, ROWS, M), dtype),
            shared_tile((stages, tile, ROWS), dtype, row_bytes=row_bytes),
            shared_tile((WARPGROUPS, M, ROWS), jnp.float32),
            *barriers(copies=2, warpgroups=WARPGROUPS, stages=stages),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(hidden_AFM, down_EDF, shared_down_DF, ids_E, count_1)


def _expert_at(ids, place: jax.Array) -> jax.Array:
    """The expert that stands at a place of the list; any expert past its end, where the shared one is."""
    last = ids.shape[0] - 1
    return jnp.minimum(ids[jnp.minimum(place, last)], last)
