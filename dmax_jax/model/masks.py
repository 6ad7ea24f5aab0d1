"""Who may see whom, as a mask or as a pattern that needs none."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """A block sees itself and all earlier blocks; said without a mask, so that attention can skip what is hidden.

    Without a cache this is `block_causal_mask`. With the clean stream as the cache of a noisy one, the earlier blocks
    are the clean ones: the two-stream mask of training.
    """

    block_length: int


@struct.dataclass
class CachedBlocks:
    """New blocks over a cache: see `decode_attention`."""

    seen_B: jax.Array  # cached positions that may be seen
    sees_previous_B: jax.Array  # whether a new block sees the new ones before it
    block_length: int = struct.field(pytree_node=False)


Visible = jax.Array | BlockPattern | CachedBlocks


def block_causal_mask(length: int, block_length: int) -> jax.Array:
    """[1, T, T], true where visible: a position sees its own and all earlier blocks; the grid starts at position 0."""
    block_T = jnp.arange(length) // block_length
    return (block_T[:, None] >= block_T[None, :])[None]
