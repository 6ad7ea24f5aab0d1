"""Grouped-query attention on plain arrays: under any mask, and block by block.

Softmax in float32; G = N / K query heads share a key head.
"""

import itertools

import jax
import jax.numpy as jnp

NEG_INF = -1e30  # finite, so that a query that sees nothing gives a harmless mean instead of NaN

# Into how many runs of blocks `block_attention` is unrolled: more of them skip more hidden scores and compile longer.
RUNS = 3


def masked_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Returns [B, T, N, H]; `mask_BTS` is true where a key may be seen, its batch axis may be 1."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = _scores("btkgh,bskh->bkgts", q_BTKGH, k_BSKH)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, NEG_INF)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


def block_attention(
    q_BTNH: jax.Array,
    own: tuple[jax.Array, jax.Array],
    earlier: tuple[jax.Array, jax.Array],
    *,
    block_length: int,
    runs: int = RUNS,
) -> jax.Array:
    """Attention in which a block sees its `own` keys and values and those of all `earlier` blocks. [B, T, N, H].

    Both pairs are [B, T, K, H] over the same blocks, T a multiple of the block length: with one pair twice the pattern
    is block-causal, with two streams it is that of training's noisy half. Own and earlier scores are formed apart, and
    a run of blocks forms none for what lies behind it, so that few are formed in vain.
    """
    B, T, N, H = q_BTNH.shape
    K, W = own[0].shape[2], block_length
    C = T // W
    q_BCWKGH = q_BTNH.reshape(B, C, W, K, N // K, H)
    own_BCWKH, earlier_BCWKH = ([x.reshape(B, C, W, K, H) for x in pair] for pair in (own, earlier))
    runs = min(runs, C)
    outs = [
        _attend_run(
            q_BCWKGH[:, first:end],
            [x[:, first:end] for x in own_BCWKH],
            [x[:, : end - 1] for x in earlier_BCWKH],  # the run's last block is before none of its queries
            first,
        )
        for first, end in itertools.pairwise(C * run // runs for run in range(runs + 1))
    ]
    return jnp.concatenate(outs, axis=1).reshape(B, T, N, H)


def _attend_run(q_BCWKGH: jax.Array, own: list[jax.Array], earlier: list[jax.Array], first: int) -> jax.Array:
    """Queries of the C blocks from `first` on, over their own blocks and those of the P `earlier` ones before them."""
    C, P = q_BCWKGH.shape[1], earlier[0].shape[1]
    (k_BCWKH, v_BCWKH), (k_BPWKH, v_BPWKH) = own, earlier
    own_BKGCWU = _scores("bcwkgh,bcukh->bkgcwu", q_BCWKGH, k_BCWKH)
    before_BKGCWPU = _scores("bcwkgh,bpukh->bkgcwpu", q_BCWKGH, k_BPWKH)
    is_before_CP = jnp.arange(P)[None] < first + jnp.arange(C)[:, None]
    before_BKGCWPU = jnp.where(is_before_CP[None, None, None, :, None, :, None], before_BKGCWPU, NEG_INF)

    top_BKGCW = jnp.max(own_BKGCWU, axis=-1)
    if P:
        top_BKGCW = jnp.maximum(top_BKGCW, jnp.max(before_BKGCWPU, axis=(-2, -1)))
    top_BKGCW = jax.lax.stop_gradient(top_BKGCW)  # scales both parts alike; the result does not depend on it
    own_BKGCWU = jnp.exp(own_BKGCWU - top_BKGCW[..., None])
    before_BKGCWPU = jnp.exp(before_BKGCWPU - top_BKGCW[..., None, None])
    sum_BKGCW = jnp.sum(own_BKGCWU, axis=-1) + jnp.sum(before_BKGCWPU, axis=(-2, -1))
    out_BCWKGH = _mix("bkgcwu,bcukh->bcwkgh", own_BKGCWU, v_BCWKH)
    out_BCWKGH = out_BCWKGH + _mix("bkgcwpu,bpukh->bcwkgh", before_BKGCWPU, v_BPWKH)
    sum_BCWKG1 = jnp.moveaxis(sum_BKGCW, (3, 4), (1, 2))[..., None]
    return (out_BCWKGH / sum_BCWKG1).astype(v_BCWKH.dtype)


def _scores(axes: str, q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(axes, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _mix(axes: str, weights: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum(axes, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
