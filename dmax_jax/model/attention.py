"""Grouped-query attention over a cache and the sequence's own positions, under a mask or a pattern."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.attention import block_attention, masked_attention
from dmax_jax.kernels.decode_attention import decode_attention
from dmax_jax.kernels.device_sums import Inbox
from dmax_jax.kernels.layers import rms_norm, rotate
from dmax_jax.kernels.projection import project_rows
from dmax_jax.model.cache import LayerKV
from dmax_jax.model.masks import BlockPattern, CachedBlocks, Visible
from dmax_jax.model.params import Attention
from dmax_jax.model.shares import add_and_norm_over_shares, project_over_shares


def attention(
    x_BTD: jax.Array,
    parts: jax.Array | None,
    norm_D: jax.Array,
    weights: Attention,
    angles: tuple[jax.Array, jax.Array],
    visible: Visible,
    cached: LayerKV | None,
    config: ModelConfig,
    inbox: Inbox | None = None,
) -> tuple[jax.Array, jax.Array | None, LayerKV]:
    """Adds the parts [P, B, T, D] that are left to T positions of the residual stream, normalises, attends from them.

    Returns the stream and the output as `project_over_shares` does, and the T new keys and values.
    `visible` is a mask [B, T, S] over S = cached + T positions, true where one may be seen, whose batch axis may be 1;
    or CachedBlocks; or a BlockPattern, in which `cached` are the T positions of the stream with the earlier blocks.
    """
    B, T, _ = x_BTD.shape
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x_BTD, normal_BTD, _ = add_and_norm_over_shares(x_BTD, parts, norm_D, config.rms_norm_eps, inbox)
    qkv_BTNH = project_rows(normal_BTD, weights.qkv).reshape(B, T, N + 2 * K, H)
    if isinstance(visible, CachedBlocks):
        out_BTNH, k_BTKH = decode_attention(
            qkv_BTNH,
            (weights.q_norm, weights.k_norm),
            angles,
            (cached.k_BSKH, cached.v_BSKH),
            visible.seen_B,
            visible.sees_previous_B,
            block_length=visible.block_length,
            eps=config.rms_norm_eps,
        )
        new = LayerKV(k_BTKH, qkv_BTNH[:, :, N + K :])
        return *project_over_shares(out_BTNH.reshape(B, T, N * H), weights.out, x_BTD), new
    q_BTNH, k_BTKH, v_BTKH = jnp.split(qkv_BTNH, (N, N + K), axis=2)
    q_BTNH = rotate(rms_norm(q_BTNH, weights.q_norm, config.rms_norm_eps), *angles)
    k_BTKH = rotate(rms_norm(k_BTKH, weights.k_norm, config.rms_norm_eps), *angles)
    new = LayerKV(k_BTKH, v_BTKH)
    if isinstance(visible, BlockPattern):
        earlier = new if cached is None else cached
        pairs = [(kv.k_BSKH, kv.v_BSKH) for kv in (new, earlier)]
        out_BTNH = block_attention(q_BTNH, *pairs, block_length=visible.block_length)
    else:
        seen = new if cached is None else jax.tree.map(lambda old, own: jnp.concatenate([old, own], 1), cached, new)
        out_BTNH = masked_attention(q_BTNH, seen.k_BSKH, seen.v_BSKH, visible)
    return *project_over_shares(out_BTNH.reshape(B, T, N * H), weights.out, x_BTD), new
