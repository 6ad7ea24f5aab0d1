"""The key/value cache: one pair of arrays per layer, written block by block at a place of each row's own."""

import jax
import jax.numpy as jnp
from flax import struct

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.hopper import ROWS

TILE = ROWS  # positions that a kernel reads at once: a capacity in whole tiles suits it


@struct.dataclass
class LayerKV:
    """Keys (after norm and rotation) and values of one layer."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


KVCache = tuple[LayerKV, ...]


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros for `capacity` positions per row."""
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    zeros = jnp.zeros(shape, dtype)
    return tuple(LayerKV(zeros, zeros) for _ in range(config.num_hidden_layers))


def write_cache(cache: KVCache, new: KVCache, start_B: jax.Array, where_B: jax.Array) -> KVCache:
    """Writes T new positions at `start_B` of each row; rows outside `where_B` keep what they have."""

    def write_row(old_SKH: jax.Array, new_TKH: jax.Array, start: jax.Array, where: jax.Array) -> jax.Array:
        kept_TKH = jax.lax.dynamic_slice_in_dim(old_SKH, start, new_TKH.shape[0])
        return jax.lax.dynamic_update_slice_in_dim(old_SKH, jnp.where(where, new_TKH, kept_TKH), start, axis=0)

    def write(old: jax.Array, fresh: jax.Array) -> jax.Array:
        return jax.vmap(write_row)(old, fresh.astype(old.dtype), start_B, where_B)

    return jax.tree.map(write, cache, new)
