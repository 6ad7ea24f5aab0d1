"""The decoder stack: one function of parameters, embeddings, positions, mask and cache."""

import contextlib

import jax
import jax.numpy as jnp
from flax import struct

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.embedding import lookup
from dmax_jax.kernels.layers import feed_forward, rotary_angles
from dmax_jax.kernels.quantised_weight import project_to_float32
from dmax_jax.model.attention import attention
from dmax_jax.model.cache import KVCache
from dmax_jax.model.masks import CachedBlocks, Visible
from dmax_jax.model.moe import moe, wants_digits
from dmax_jax.model.params import Layer, Moe, Params
from dmax_jax.model.shares import add_and_norm_over_shares


@struct.dataclass
class Output:
    hidden_BTD: jax.Array  # after the final norm
    kv: KVCache  # keys and values of the T positions
    loads: tuple[jax.Array, ...]  # one [E] per sparse layer: rows that chose each expert


def transformer(
    params: Params,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    visible: Visible,
    config: ModelConfig,
    *,
    cache: KVCache | None = None,
) -> Output:
    """Runs all layers on T positions.

    `visible` is a mask [B, T, S] over S = cached + T positions, true where one may be seen; or CachedBlocks; or a
    BlockPattern, in which the cache holds the T positions of the stream that the earlier blocks are taken from
    (default: the own one).
    The computation is in the dtype of the parameters, to which `x_BTD` is cast. Batch axes of positions and mask may
    be 1.
    """
    x_BTD = x_BTD.astype(params.embed.dtype)
    angles = rotary_angles(positions_BT, config.rotary_dim, config.rope_theta)
    if isinstance(visible, CachedBlocks):  # angles are made before the first layer and don't interrupt it
        x_BTD, angles = jax.lax.optimization_barrier((x_BTD, angles))
    kv, loads, parts = [], [], None  # parts of what the last layer adds
    with exact_products(x_BTD.dtype):
        for index, layer in enumerate(params.layers):
            with jax.named_scope(f"layer_{index}"):
                cached = None if cache is None else cache[index]
                x_BTD, parts, new, load = _layer(x_BTD, parts, layer, angles, visible, cached, config, params.inbox)
            kv.append(new)
            loads += [] if load is None else [load]
    _, hidden_BTD, _ = add_and_norm_over_shares(x_BTD, parts, params.norm, config.rms_norm_eps, params.inbox)
    return Output(hidden_BTD, tuple(kv), tuple(loads))


def _layer(x_BTD, parts: jax.Array | None, layer: Layer, angles, visible, cached, config: ModelConfig, inbox):
    """Returns the residual stream, parts that the next norm adds to it, new keys and values, and the experts' loads."""
    with jax.named_scope("attention"):
        weights = layer.attention_norm, layer.attention
        x_BTD, parts, new = attention(x_BTD, parts, *weights, angles, visible, cached, config, inbox)
    with jax.named_scope("mlp"):
        is_sparse = isinstance(layer.mlp, Moe)
        as_digits = is_sparse and wants_digits(x_BTD, layer.mlp)
        x_BTD, normal_BTD, digits = add_and_norm_over_shares(
            x_BTD, parts, layer.mlp_norm, config.rms_norm_eps, inbox, digits=as_digits
        )
        if is_sparse:
            parts, load_E = moe(normal_BTD, digits, layer.mlp, config)
        else:
            parts, load_E = feed_forward(normal_BTD, layer.mlp.gate, layer.mlp.up, layer.mlp.down)[None], None
        return x_BTD, parts, new, load_E


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding table: [...] -> [..., D]."""
    return lookup(params.embed, tokens)


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits in float32: [..., D] -> [..., V], of the share's tokens (model/shares.py)."""
    with exact_products(hidden.dtype):
        return project_to_float32(hidden, params.head)


def exact_products(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Keeps float32 products in float32; a GPU's default would round their factors to TF32."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
