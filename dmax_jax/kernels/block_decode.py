"""Attention of a few positions per row over a key/value cache, for decoding block by block."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.attention import NEG_INF, masked_attention
from dmax_jax.kernels.hopper import ROWS, Stream, barriers, is_hopper, shared_tile, stages_that_fit

WARPGROUPS = 2  # that take every other tile of keys; one more fetches
Pair = tuple[jax.Array, jax.Array]  # keys and values


def decode_attention(
    q_BTNH: jax.Array,
    own: Pair,
    cached: Pair,
    seen_B: jax.Array,
    sees_previous_B: jax.Array,
    *,
    block_length: int,
) -> jax.Array:
    """Attention of T new positions, in blocks, over their `own` keys and values [B, T, K, H] and `cached` ones.

    A position sees the first `seen_B` of the S cached positions, its own block, and the new blocks before it in rows
    where `sees_previous_B`. Softmax in float32. Returns [B, T, N, H].
    """
    implementation = decode_in_tiles if _suits_tiles(q_BTNH, own, cached) else decode_masked
    return implementation(q_BTNH, own, cached, seen_B, sees_previous_B, block_length=block_length)


def _suits_tiles(q_BTNH: jax.Array, own: Pair, cached: Pair) -> bool:
    (_, T, N, H), K, S = q_BTNH.shape, own[0].shape[2], cached[0].shape[1]
    whole = S > 0 and S % ROWS == 0 and (ROWS % T == 0 or T % ROWS == 0) and T % 8 == 0 and H in (64, 128)
    return is_hopper() and q_BTNH.dtype == jnp.bfloat16 and whole and (N // K) % max(1, ROWS // T) == 0


def decode_masked(q_BTNH, own: Pair, cached: Pair, seen_B, sees_previous_B, *, block_length: int) -> jax.Array:
    """`decode_attention` under a mask over cached and own positions."""
    B, T = q_BTNH.shape[:2]
    S = cached[0].shape[1]
    block_T = jnp.arange(T) // block_length
    seen_BTS = jnp.broadcast_to((jnp.arange(S)[None] < seen_B[:, None])[:, None], (B, T, S))
    before_1TT = (block_T[None, :] < block_T[:, None])[None]
    own_BTT = (block_T[None, :] == block_T[:, None])[None] | (before_1TT & sees_previous_B[:, None, None])
    keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(cached, own, strict=True))
    return masked_attention(q_BTNH, keys, values, jnp.concatenate([seen_BTS, own_BTT], axis=2))


def decode_in_tiles(
    q_BTNH, own: Pair, cached: Pair, seen_B, sees_previous_B, *, block_length: int, interpret=False
) -> jax.Array:
    """`decode_attention` on a Hopper GPU: blocks of threads with 64 query rows walk over tiles of 64 keys.

    Query heads that share a key head fill the rows of a tile. Only tiles in which something may be seen are read.
    """
    B, T, N, H = q_BTNH.shape
    K = own[0].shape[2]
    heads = max(1, ROWS // T)  # query heads in a tile of 64 rows
    tiles = max(1, T // ROWS)
    own = [jnp.pad(array, ((0, 0), (0, -T % ROWS), (0, 0), (0, 0))) for array in own]
    own_tiles = own[0].shape[1] // ROWS
    dtype = q_BTNH.dtype
    other = ROWS * H * dtype.itemsize + ROWS * H * 4 + WARPGROUPS * ROWS * ROWS * dtype.itemsize + ROWS * 8
    stages = stages_that_fit(2 * ROWS * H * dtype.itemsize, other, most=4)
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    def body(
        q, own_k, own_v, cached_k, cached_v, seen, sees_previous, out,
        q_s, k_s, v_s, probs_s, acc_s, top_s, total_s, q_full, handed_over, full, empty,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        row, group, tile = lax.axis_index("row"), lax.axis_index("group"), lax.axis_index("tile")
        head = lax.div(group * heads, N // K)  # of keys and values
        count = own_tiles + pl.cdiv(seen[row], ROWS)  # tiles of keys: own ones first, then cached ones
        stream = Stream(full, empty, stages)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            span = min(T, ROWS)
            for number in range(heads):
                plgpu.copy_gmem_to_smem(
                    q.at[row, pl.ds(tile * span, span), group * heads + number],
                    q_s.at[pl.ds(number * span, span)],
                    q_full,
                )

            def load(step, slot, barrier):
                @pl.when(step < own_tiles)
                def _own():
                    at = row, pl.ds(step * ROWS, ROWS), head
                    plgpu.copy_gmem_to_smem(own_k.at[at], k_s.at[slot], barrier)
                    plgpu.copy_gmem_to_smem(own_v.at[at], v_s.at[slot], barrier)

                @pl.when(step >= own_tiles)
                def _cached():
                    at = row, pl.ds((step - own_tiles) * ROWS, ROWS), head
                    plgpu.copy_gmem_to_smem(cached_k.at[at], k_s.at[slot], barrier)
                    plgpu.copy_gmem_to_smem(cached_v.at[at], v_s.at[slot], barrier)

            stream.fill(count, load)

        @pl.when(warpgroup < WARPGROUPS)
        def _attend():
            plgpu.set_max_registers(232, action="increase")
            at_query = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=plgpu.Layout.WGMMA)
            at_key = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=plgpu.Layout.WGMMA)
            position = lax.rem(at_query, T) if heads > 1 else at_query + tile * ROWS
            query_block = lax.div(position, block_length)
            may_look_back = sees_previous[row]
            plgpu.barrier_wait(q_full)

            def over(value, width):
                return lax.broadcast_in_dim(value, (ROWS, width), [0])

            def visible(step):
                """Of a tile's keys, for every query."""
                key = at_key + step * ROWS
                key_block = lax.div(key, block_length)
                back = jnp.where(key_block < query_block, may_look_back, 0)
                in_own = jnp.where(key_block == query_block, 1, back)
                in_own = jnp.where(key < T, in_own, 0)
                in_cache = jnp.where(key - own_tiles * ROWS < seen[row], 1, 0)
                is_own = jnp.where(step < own_tiles, 1, 0)
                return in_own * is_own + in_cache * (1 - is_own) > 0

            def attend(turn, carry):
                acc, top, total = carry
                step = warpgroup + turn * WARPGROUPS
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])

                def score(scores):
                    plgpu.wgmma(scores, q_s, k_s.at[slot].transpose((1, 0)))
                    return scores[...]

                scores = pl.run_scoped(score, plgpu.ACC((ROWS, ROWS), jnp.float32)) * H**-0.5
                scores = jnp.where(visible(step), scores, NEG_INF)
                new_top = jnp.maximum(top, jnp.max(scores, axis=1))
                shrink = jnp.exp(top - new_top)
                probs = jnp.exp(scores - over(new_top, ROWS))
                total = total * shrink + jnp.sum(probs, axis=1)
                probs_s[warpgroup] = probs.astype(dtype)
                plgpu.commit_smem()

                def mix(mixed):
                    plgpu.wgmma(mixed, probs_s.at[warpgroup], v_s.at[slot])
                    return mixed[...]

                acc = acc * over(shrink, H) + pl.run_scoped(mix, plgpu.ACC((ROWS, H), jnp.float32))
                plgpu.barrier_arrive(empty.at[slot])
                return acc, new_top, total

            start = (
                plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
                plgpu.layout_cast(jnp.full((ROWS,), NEG_INF, jnp.float32), row_layout),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
            )
            turns = pl.cdiv(count - warpgroup, WARPGROUPS)
            acc, top, total = lax.fori_loop(0, turns, attend, start)

            @pl.when(warpgroup == 1)
            def _hand_over():
                acc_s[...] = acc
                top_s[...] = top
                total_s[...] = total
                plgpu.barrier_arrive(handed_over)

            @pl.when(warpgroup == 0)
            def _merge():
                plgpu.barrier_wait(handed_over)
                other_top = plgpu.load(top_s, layout=row_layout, optimized=False)
                other_sum = plgpu.load(total_s, layout=row_layout, optimized=False)
                other_acc = plgpu.load(acc_s, layout=plgpu.Layout.WGMMA, optimized=False)
                best = jnp.maximum(top, other_top)
                mine, others = jnp.exp(top - best), jnp.exp(other_top - best)
                whole = total * mine + other_sum * others
                mixed = acc * over(mine / whole, H) + other_acc * over(others / whole, H)
                q_s[...] = mixed.astype(dtype)
                plgpu.commit_smem()
                span = min(T, ROWS)
                for number in range(heads):
                    plgpu.copy_smem_to_gmem(
                        q_s.at[pl.ds(number * span, span)],
                        out.at[row, pl.ds(tile * span, span), group * heads + number],
                    )
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
        grid=(B, N // heads, tiles),
        grid_names=("row", "group", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            shared_tile((ROWS, H), dtype),
            shared_tile((stages, ROWS, H), dtype),
            shared_tile((stages, ROWS, H), dtype),
            shared_tile((WARPGROUPS, ROWS, ROWS), dtype),
            plgpu.SMEM((ROWS, H), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=heads),
            plgpu.Barrier(),
            *barriers(copies=2, warpgroups=1, stages=stages),
        ],
        interpret=interpret,
    )(q_BTNH, *own, *cached, seen_B, sees_previous_B.astype(jnp.int32))
