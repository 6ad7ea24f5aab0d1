"""Attention of a few positions per row over a key/value cache, for decoding block by block."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.attention import NEG_INF, masked_attention
from dmax_jax.kernels.clusters import counter, expect, give, leave, wait_for_all
from dmax_jax.kernels.hopper import ROWS, is_hopper, multiprocessors, shared_tile, stages_that_fit
from dmax_jax.kernels.layers import rms_norm, rotate
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier

MAX_PARTS = 8  # blocks of threads in a cluster
NARROW = 8  # columns of the narrowest tile that a block can give to others
SMALLEST = 1e-30  # sum of exponentials to divide by
PARAMS = plgpu.CompilerParams(approx_math=True)
LOG2_E = math.log2(math.e)
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


@kernel("block_length", "eps", "parts")
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
    parts: int | None = None,
    interpret=False,
    overlap=False,
) -> tuple[jax.Array, jax.Array]:
    """`decode_attention` in one kernel for a Hopper GPU.

    A cluster of `parts` blocks of threads (default: as many as there is room for) has 64 rows of queries: all T
    positions in as many query heads of one key head. Each block readies the queries and takes every `parts`-th tile of
    64 keys, of those that are seen; one of them has the new keys. Each stores what it has in the others' shared memory,
    and joins its share of the columns.
    """
    B, T, heads, H = qkv_BTNH.shape
    K = cached[0].shape[2]
    N, dtype = heads - 2 * K, qkv_BTNH.dtype
    together = ROWS // T  # query heads in a cluster
    half = angles[0].shape[-1]
    pieces = (0, half), (half, 2 * half), (2 * half, H)
    groups = N // together
    parts = parts or parts_that_fit(B * groups)
    share = H // parts  # columns of the output that a block writes
    tile_bytes = ROWS * H * dtype.itemsize
    received_bytes = ROWS * (H + NARROW * parts) * 4 if parts > 1 else 0
    given_bytes = ROWS * (H + NARROW) * 4 if parts > 1 else 0
    others = tile_bytes + given_bytes + received_bytes + 2 * ROWS * half * 4 + ROWS * (ROWS + share) * dtype.itemsize
    others -= tile_bytes if parts == 1 else 0  # the output takes the place of the queries
    # A block has as much on its way as it can, unless there are so many that two should stand on a multiprocessor.
    stages = stages_that_fit(2 * tile_bytes, others, most=4 if B * groups <= multiprocessors() else 2)
    wgmma, by_row, by_column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def load(ref, layout=wgmma):
        return plgpu.load(ref, layout=layout, optimized=False)

    def over(value, width):
        return lax.broadcast_in_dim(value, (ROWS, width), [0])

    def body(
        qkv, q_norm, k_norm, cosines, sines, cached_k, cached_v, seen, sees_previous, out, new_k,
        q_s, cos_s, sin_s, k_s, v_s, probs_s, q_full, own_full, full,
        out_s=None, own_shares_s=None, shares_s=None, own_sums_s=None, sums_s=None, received=None,
    ):  # fmt: skip
        row, group, part = lax.axis_index("row"), lax.axis_index("group"), lax.axis_index("part")
        head = lax.div(group * together, N // K)  # of keys and values
        wait_for_earlier(overlap)
        limit, sees_back = seen[row], sees_previous[row]
        count = pl.cdiv(limit, ROWS)  # tiles of cached keys
        own = jnp.minimum(count, parts - 1)  # where the new keys' tile stands among them: as the first of a block
        turns = pl.cdiv(count + 1 - part, parts)

        def find(turn):
            """The buffer of a tile, the number of cached tiles before it, and whether it is the new keys' tile."""
            tile = part + turn * parts
            return lax.rem(turn, stages), tile - jnp.where(tile > own, 1, 0), tile == own

        def fetch(ref, scratch, barrier):
            """All T rows of something, again and again: 64 rows."""
            for number in range(together):
                plgpu.copy_gmem_to_smem(ref, scratch.at[pl.ds(number * T, T)], barrier)

        def fetch_tile(turn):
            slot, step, _ = find(turn)
            at = row, pl.ds(step * ROWS, ROWS), head
            plgpu.copy_gmem_to_smem(cached_k.at[at], k_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(cached_v.at[at], v_s.at[slot], full.at[slot])

        for number in range(together):
            rows = pl.ds(number * T, T)
            plgpu.copy_gmem_to_smem(qkv.at[row, :, group * together + number], q_s.at[rows], q_full)
        fetch(cosines.at[row], cos_s, q_full)
        fetch(sines.at[row], sin_s, q_full)

        @pl.when(part == own)
        def _fetch_own():
            fetch(qkv.at[row, :, N + head], k_s.at[0], own_full)
            fetch(qkv.at[row, :, N + K + head], v_s.at[0], own_full)

        @pl.loop(jnp.where(part == own, 1, 0), jnp.minimum(turns, stages))
        def _fetch_first(turn):
            fetch_tile(turn)

        if parts > 1:
            expect(received, received_bytes)

        def ready(ref, norm, barrier):
            """Normalises and rotates the rows of a tile in place, rounding where the plain functions do."""
            weight = load(norm, by_column).astype(jnp.float32)
            plgpu.barrier_wait(barrier)
            x = load(ref).astype(jnp.float32)
            x = x * over(lax.rsqrt(jnp.sum(x * x, axis=1) * (1 / H) + eps), H)
            x = x.astype(dtype).astype(jnp.float32) * lax.broadcast_in_dim(weight, (ROWS, H), [1])
            x = x.astype(dtype).astype(jnp.float32)
            first, second, *rest = (lax.slice(x, (0, at), (ROWS, end)) for at, end in pieces if at < end)
            cos, sin = load(cos_s), load(sin_s)
            turned = [first * cos - second * sin, second * cos + first * sin]
            ref[...] = jnp.concatenate(turned + rest, axis=1).astype(dtype)
            plgpu.commit_smem()

        ready(q_s, q_norm, q_full)

        @pl.when(part == own)
        def _ready_own():
            ready(k_s.at[0], k_norm, own_full)

            @pl.when(lax.rem(group * together, N // K) == 0)
            def _keep():
                plgpu.copy_smem_to_gmem(k_s.at[0, pl.ds(0, T)], new_k.at[row, :, head])

        at_key = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=wgmma)
        at_query = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=wgmma)
        query_block = lax.div(lax.rem(at_query, T), block_length)
        low_own = query_block * (block_length * (1 - sees_back))  # of the new keys that a query sees
        high_own = jnp.minimum((query_block + 1) * block_length, T)

        def attend(turn, carry):
            """One tile of keys: the scores, and the sums that a softmax is made of, so far."""
            acc, top, total = carry
            slot, step, is_own = find(turn)
            pl.when(~is_own)(lambda: plgpu.barrier_wait(full.at[slot]))

            def score(scores):
                plgpu.wgmma(scores, q_s, k_s.at[slot].transpose((1, 0)))
                return scores[...]

            scores = pl.run_scoped(score, plgpu.ACC((ROWS, ROWS), jnp.float32)) * (H**-0.5 * LOG2_E)
            among_own = jnp.where(is_own, 1, 0)
            left = (1 - among_own) * (limit - step * ROWS)
            is_seen = (at_key >= low_own * among_own) & (at_key < high_own * among_own + left)
            scores = jnp.where(is_seen, scores, NEG_INF)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            shrink = jnp.exp2(top - new_top)
            probs = jnp.exp2(scores - over(new_top, ROWS))
            probs_s[...] = probs.astype(dtype)
            plgpu.commit_smem()

            def mix(mixed):
                plgpu.wgmma(mixed, probs_s, v_s.at[slot])
                earlier, whole = acc * over(shrink, H), total * shrink + jnp.sum(probs, axis=1)  # meanwhile
                return earlier + mixed[...], whole

            new_acc, new_total = pl.run_scoped(mix, plgpu.ACC((ROWS, H), jnp.float32))

            @pl.when(turn + stages < turns)
            def _next():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the new keys may stand in this buffer
                fetch_tile(turn + stages)

            return new_acc, new_top, new_total

        start = (
            plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), wgmma),
            plgpu.layout_cast(jnp.full((ROWS,), NEG_INF, jnp.float32), by_row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
        )
        acc, top, total = lax.fori_loop(0, turns, attend, start)
        start_next(overlap)
        total = jnp.maximum(total, SMALLEST)  # 0 if this block has no tiles
        joined = acc * over(1 / total, H)
        if parts > 1:
            sums = over(top + jnp.log2(total), NARROW)  # logarithms: weights of the blocks' results
            own_sums_s[...] = sums
            for number in range(parts):
                own_shares_s[number] = lax.slice(joined, (0, number * share), (ROWS, (number + 1) * share))
            give([own_shares_s, own_sums_s], [shares_s, sums_s], received)
            wait_for_all(received)
            sums = [load(sums_s.at[i]) for i in range(parts)]
            best = functools.reduce(jnp.maximum, sums)
            weights = [jnp.exp2(x - best) for x in sums]
            whole = sum(weights)
            wide = [jnp.concatenate([weight / whole] * (share // NARROW), axis=1) for weight in weights]
            joined = sum(load(shares_s.at[i]) * weight for i, weight in enumerate(wide))
        out_s = q_s if parts == 1 else out_s  # the queries have done their work
        out_s[...] = joined.astype(dtype)
        plgpu.commit_smem()
        columns = pl.ds(part * share, share)
        for number in range(together):
            rows = pl.ds(number * T, T)
            plgpu.copy_smem_to_gmem(out_s.at[rows], out.at[row, :, group * together + number, columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if parts > 1:
            leave()

    shares = shared_tile((parts, ROWS, share), jnp.float32)
    sums = shared_tile((ROWS, NARROW), jnp.float32), shared_tile((parts, ROWS, NARROW), jnp.float32)
    out_BTNH, new_k_BTKH = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, H), dtype),
            jax.ShapeDtypeStruct((B, T, K, H), dtype),
        ],
        grid=(B, groups),
        grid_names=("row", "group"),
        cluster=(parts,),
        cluster_names=("part",),
        scratch_types=[
            shared_tile((ROWS, H), dtype),
            *[shared_tile((ROWS, half), jnp.float32)] * 2,
            *[shared_tile((stages, ROWS, H), dtype)] * 2,
            shared_tile((ROWS, ROWS), dtype),
            plgpu.Barrier(num_arrivals=3 * together),
            plgpu.Barrier(num_arrivals=2 * together),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            *((shared_tile((ROWS, share), dtype), shares, shares, *sums, counter()) if parts > 1 else ()),
        ],
        compiler_params=PARAMS,
        interpret=interpret,
    )(qkv_BTNH, *norms, *angles, *cached, seen_B, sees_previous_B.astype(jnp.int32))
    return out_BTNH, new_k_BTKH


def parts_that_fit(clusters: int) -> int:
    """Blocks per cluster; those of one stand close together, so only pairs find room on every multiprocessor."""
    parts = MAX_PARTS
    while parts > 2 and 4 * clusters * parts > 3 * multiprocessors():
        parts //= 2
    return parts if clusters * parts <= multiprocessors() else 1
