"""Attention of a few positions per row over a key/value cache, for decoding block by block."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.attention import NEG_INF, masked_attention
from dmax_jax.kernels.hopper import ROWS, Stream, barriers, is_hopper, kernel, shared_tile, stages_that_fit
from dmax_jax.kernels.layers import rms_norm, rotate

WARPGROUPS = 2  # that take every other tile of keys; one more fetches
Pair = tuple[jax.Array, jax.Array]  # of keys and values; weights for queries and keys; cosines and sines


def decode_attention(
    qkv_BTNH: jax.Array,
    norms: Pair,
    angles: Pair,
    cached: Pair,
    seen_B: jax.Array,
    sees_previous_B: jax.Array,
    *,
    block_length: int,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of T new positions, in blocks, over themselves and the `cached` keys and values [B, S, K, H].

    `qkv_BTNH` are the query, key and value heads of a projection; queries and keys get an RMS norm with the weights [H]
    of `norms`, then a rotation by `angles`, cosines and sines [B, T, R] in float32. A position sees the first `seen_B`
    of the cached positions, its own block, and the new blocks before it in rows where `sees_previous_B`. Softmax in
    float32. Returns the output [B, T, N, H] and the new keys [B, T, K, H].
    """
    implementation = fused_decode_attention if can_fuse(qkv_BTNH, angles, cached) else plain_decode_attention
    limits = seen_B, sees_previous_B
    return implementation(qkv_BTNH, norms, angles, cached, *limits, block_length=block_length, eps=eps)


def plain_decode_attention(
    qkv_BTNH, norms: Pair, angles: Pair, cached: Pair, seen_B, sees_previous_B, *, block_length: int, eps: float
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` under a mask over cached and new positions."""
    B, T, heads, _ = qkv_BTNH.shape
    S, K = cached[0].shape[1:3]
    N = heads - 2 * K
    q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTNH, (N, N + K), axis=2)
    q_BTNH, k_BTKH = (rotate(rms_norm(x, norm, eps), *angles) for x, norm in zip((q_BTNH, k_BTKH), norms, strict=True))
    block_T = jnp.arange(T) // block_length
    seen_BTS = jnp.broadcast_to((jnp.arange(S)[None] < seen_B[:, None])[:, None], (B, T, S))
    before_1TT = (block_T[None, :] < block_T[:, None])[None]
    own_BTT = (block_T[None, :] == block_T[:, None])[None] | (before_1TT & sees_previous_B[:, None, None])
    keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(cached, (k_BTKH, v_BTKH), strict=True))
    return masked_attention(q_BTNH, keys, values, jnp.concatenate([seen_BTS, own_BTT], axis=2)), k_BTKH


def can_fuse(qkv_BTNH: jax.Array, angles: Pair, cached: Pair) -> bool:
    """Whether device, dtype and shapes suit `fused_decode_attention`."""
    B, T, heads, H = qkv_BTNH.shape
    S, K = cached[0].shape[1:3]
    queries = (heads - 2 * K) // K
    dtypes = {array.dtype for array in (qkv_BTNH, *cached)}
    suits = (
        H == 128
        and angles[0].shape[0] == B
        and 2 * angles[0].shape[-1] in (64, 128)
        and S % ROWS == 0
        and T in (8, 16, 32, 64)
        and queries % (ROWS // T) == 0
    )
    return is_hopper() and dtypes == {jnp.dtype("bfloat16")} and suits


@kernel("block_length", "eps")
def fused_decode_attention(
    qkv_BTNH: jax.Array,
    norms: Pair,
    angles: Pair,
    cached: Pair,
    seen_B: jax.Array,
    sees_previous_B: jax.Array,
    *,
    block_length: int,
    eps: float,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` in one kernel for a Hopper GPU.

    A block of threads has 64 rows of queries: all T positions in as many query heads of one key head. Of its two
    warpgroups one readies the queries, the other the new keys; then they take every other tile of 64 cached positions,
    and only of those that are seen, and join what they have. The rotation is a product with a signed permutation.
    """
    B, T, heads, H = qkv_BTNH.shape
    K = cached[0].shape[2]
    N, dtype = heads - 2 * K, qkv_BTNH.dtype
    together = ROWS // T  # query heads in a block of threads
    turned = 2 * angles[0].shape[-1]  # dimensions that are rotated
    rotation = _rotations(angles, together)
    tile_bytes = ROWS * H * dtype.itemsize
    others = 3 * tile_bytes + turned**2 * dtype.itemsize + 2 * ROWS * ROWS * dtype.itemsize + ROWS * (H + 2) * 4
    stages = stages_that_fit(2 * tile_bytes, others, most=4)
    wgmma, by_row, by_column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def load(ref, layout=wgmma):
        return plgpu.load(ref, layout=layout, optimized=False)

    def over(value, width):
        return lax.broadcast_in_dim(value, (ROWS, width), [0])

    def body(
        qkv, q_norm, k_norm, cosines, sines, permutation, cached_k, cached_v, seen, sees_previous, out, new_k,
        q_s, own_k_s, own_v_s, swap_s, k_s, v_s, probs_s, acc_s, top_s, total_s,
        own_full, readied, handed_over, full, empty,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        row, group = lax.axis_index("row"), lax.axis_index("group")
        head = lax.div(group * together, N // K)  # of keys and values
        count = pl.cdiv(seen[row], ROWS)  # tiles of cached keys
        stream = Stream(full, empty, stages)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            plgpu.copy_gmem_to_smem(permutation, swap_s, own_full)
            plgpu.copy_gmem_to_smem(qkv.at[row, :, N + head], own_k_s.at[pl.ds(0, T)], own_full)
            plgpu.copy_gmem_to_smem(qkv.at[row, :, N + K + head], own_v_s.at[pl.ds(0, T)], own_full)
            for number in range(together):
                rows = pl.ds(number * T, T)
                plgpu.copy_gmem_to_smem(qkv.at[row, :, group * together + number], q_s.at[rows], own_full)

            def fetch(step, slot, barrier):
                at = row, pl.ds(step * ROWS, ROWS), head
                plgpu.copy_gmem_to_smem(cached_k.at[at], k_s.at[slot], barrier)
                plgpu.copy_gmem_to_smem(cached_v.at[at], v_s.at[slot], barrier)

            stream.fill(count, fetch)

        def ready(ref, norm):
            """Normalises and rotates the rows of a tile in place, rounding where the plain functions do."""
            x = load(ref).astype(jnp.float32)
            x = x * over(lax.rsqrt(jnp.sum(x * x, axis=1) * (1 / H) + eps), H)
            weight = lax.broadcast_in_dim(load(norm, by_column).astype(jnp.float32), (ROWS, H), [1])
            ref[...] = (x.astype(dtype).astype(jnp.float32) * weight).astype(dtype)
            plgpu.commit_smem()
            part = ref.at[:, pl.ds(0, turned)]

            def swap(swapped):
                plgpu.wgmma(swapped, part, swap_s)
                return swapped[...]

            swapped = pl.run_scoped(swap, plgpu.ACC((ROWS, turned), jnp.float32))
            straight = load(part).astype(jnp.float32)
            part[...] = (straight * load(cosines.at[row]) + swapped * load(sines.at[row])).astype(dtype)
            plgpu.commit_smem()

        def attend(keys, values, visible, carry):
            """One tile of keys: the scores, and the sums that a softmax is made of, so far."""
            acc, top, total = carry

            def score(scores):
                plgpu.wgmma(scores, q_s, keys.transpose((1, 0)))
                return scores[...]

            scores = pl.run_scoped(score, plgpu.ACC((ROWS, ROWS), jnp.float32)) * H**-0.5
            scores = jnp.where(visible, scores, NEG_INF)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            shrink = jnp.exp(top - new_top)
            probs = jnp.exp(scores - over(new_top, ROWS))
            probs_s[lax.axis_index("warpgroup")] = probs.astype(dtype)
            plgpu.commit_smem()

            def mix(mixed):
                plgpu.wgmma(mixed, probs_s.at[lax.axis_index("warpgroup")], values)
                return mixed[...]

            mixed = pl.run_scoped(mix, plgpu.ACC((ROWS, H), jnp.float32))
            return acc * over(shrink, H) + mixed, new_top, total * shrink + jnp.sum(probs, axis=1)

        @pl.when(warpgroup < WARPGROUPS)
        def _attend():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(own_full)

            @pl.when(warpgroup == 0)
            def _queries():
                ready(q_s, q_norm)

            @pl.when(warpgroup == 1)
            def _keys():
                ready(own_k_s, k_norm)
                if T < ROWS:  # a weight of 0 times what happens to stand there may be no number
                    is_there = plgpu.broadcasted_iota(jnp.int32, (ROWS, H), 0, layout=wgmma) < T
                    own_v_s[...] = jnp.where(is_there, load(own_v_s).astype(jnp.float32), 0.0).astype(dtype)
                    plgpu.commit_smem()

                @pl.when(lax.rem(group * together, N // K) == 0)
                def _keep():
                    plgpu.copy_smem_to_gmem(own_k_s.at[pl.ds(0, T)], new_k.at[row, :, head])

            plgpu.barrier_arrive(readied)
            plgpu.barrier_wait(readied)
            at_query = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=wgmma)
            at_key = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=wgmma)
            query_block = lax.div(lax.rem(at_query, T), block_length)
            key_block = lax.div(at_key, block_length)

            def pass_over(step):
                """Leaves a tile to the other warpgroup; both have to see every phase of a barrier."""
                plgpu.barrier_wait(full.at[lax.rem(step, stages)])
                plgpu.barrier_arrive(empty.at[lax.rem(step, stages)])

            def cached_tile(turn, carry):
                step = warpgroup + turn * WARPGROUPS
                pl.when(step > 0)(lambda: pass_over(step - 1))
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[slot])
                carry = attend(k_s.at[slot], v_s.at[slot], at_key + step * ROWS < seen[row], carry)
                plgpu.barrier_arrive(empty.at[slot])
                return carry

            start = (
                plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), wgmma),
                plgpu.layout_cast(jnp.full((ROWS,), NEG_INF, jnp.float32), by_row),
                plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
            )
            turns = pl.cdiv(count - warpgroup, WARPGROUPS)
            acc, top, total = lax.fori_loop(0, turns, cached_tile, start)
            is_left = (count > 0) & (lax.rem(count + 1, WARPGROUPS) != warpgroup)  # the last tile is the other's
            pl.when(is_left)(lambda: pass_over(count - 1))

            @pl.when(warpgroup == 1)
            def _hand_over():
                back = jnp.where(key_block < query_block, sees_previous[row], 0)
                in_own = jnp.where(at_key < T, jnp.where(key_block == query_block, 1, back), 0)
                acc_s[...], top_s[...], total_s[...] = attend(own_k_s, own_v_s, in_own > 0, (acc, top, total))
                plgpu.barrier_arrive(handed_over)
                plgpu.wait_smem_to_gmem(0)

            @pl.when(warpgroup == 0)
            def _join():
                plgpu.barrier_wait(handed_over)
                other_top, other_total = load(top_s, by_row), load(total_s, by_row)
                best = jnp.maximum(top, other_top)
                mine, others = jnp.exp(top - best), jnp.exp(other_top - best)
                whole = total * mine + other_total * others
                q_s[...] = (acc * over(mine / whole, H) + load(acc_s) * over(others / whole, H)).astype(dtype)
                plgpu.commit_smem()
                for number in range(together):
                    rows = pl.ds(number * T, T)
                    plgpu.copy_smem_to_gmem(q_s.at[rows], out.at[row, :, group * together + number])
                plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((B, T, N, H), dtype), jax.ShapeDtypeStruct((B, T, K, H), dtype)],
        grid=(B, N // together),
        grid_names=("row", "group"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            *[shared_tile((ROWS, H), dtype)] * 3,
            shared_tile((turned, turned), dtype),
            shared_tile((stages, ROWS, H), dtype),
            shared_tile((stages, ROWS, H), dtype),
            shared_tile((WARPGROUPS, ROWS, ROWS), dtype),
            plgpu.SMEM((ROWS, H), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=3 + together),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            plgpu.Barrier(),
            *barriers(copies=2, warpgroups=WARPGROUPS, stages=stages),
        ],
        interpret=interpret,
    )(qkv_BTNH, *norms, *rotation, *cached, seen_B, sees_previous_B.astype(jnp.int32))


def _rotations(angles: Pair, together: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x cos + (x swap) sin rotates rows: cosines and sines [B, 64, 2R], and the signed permutation [2R, 2R]."""
    half = angles[0].shape[-1]
    cosines, sines = (jnp.tile(angle, (1, together, 2)) for angle in angles)
    number = jnp.arange(2 * half)
    source, target = number[:, None], number[None, :]
    swap = jnp.where(source + half == target, 1, 0) - jnp.where(source == target + half, 1, 0)
    return cosines, sines, swap.astype(jnp.bfloat16)
