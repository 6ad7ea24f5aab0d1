"""Grouped-query attention under a given mask, over a cache and the sequence's own positions."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.model.cache import LayerKV
from dmax_jax.model.layers import rms_norm, rotate
from dmax_jax.model.params import Attention

NEG_INF = -1e30  # finite, so that a query that sees nothing gives a harmless mean instead of NaN


def attention(
    x_BTD: jax.Array,
    weights: Attention,
    angles: tuple[jax.Array, jax.Array],
    mask_BTS: jax.Array,
    cached: LayerKV | None,
    config: ModelConfig,
) -> tuple[jax.Array, LayerKV]:
    """Attends from T positions to S = cached + T positions; returns the output [B, T, D] and the T new keys and values.

    `mask_BTS` is true where a position may be seen; its batch axis may be 1.
    """
    B, T, _ = x_BTD.shape
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv_BTNH = (x_BTD @ weights.qkv.T).reshape(B, T, N + 2 * K, H)
    q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTNH, (N, N + K), axis=2)
    q_BTNH = rotate(rms_norm(q_BTNH, weights.q_norm, config.rms_norm_eps), *angles)
    k_BTKH = rotate(rms_norm(k_BTKH, weights.k_norm, config.rms_norm_eps), *angles)
    new = LayerKV(k_BTKH, v_BTKH)
    seen = new if cached is None else jax.tree.map(lambda old, own: jnp.concatenate([old, own], 1), cached, new)
    out_BTD = _attend(q_BTNH, seen.k_BSKH, seen.v_BSKH, mask_BTS).reshape(B, T, N * H) @ weights.out.T
    return out_BTD, new


def _attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, NEG_INF)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs_BKGTS, v_BSKH).reshape(B, T, N, H)
