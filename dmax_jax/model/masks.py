"""Who may see whom: block-causal, and the two-stream mask of training. True means visible."""

import jax
import jax.numpy as jnp


def block_causal_mask(length: int, block_length: int) -> jax.Array:
    """[1, T, T]: a position sees its own block and all earlier ones; the grid starts at position 0."""
    block_T = jnp.arange(length) // block_length
    return (block_T[:, None] >= block_T[None, :])[None]


def two_stream_mask(length: int, block_length: int) -> jax.Array:
    """[1, 2T, 2T] for `[noisy | clean]`, both of `length` positions.

    A noisy block sees itself and earlier clean blocks, a clean block sees itself and earlier clean blocks.
    """
    block_T = jnp.arange(length) // block_length
    own, earlier = block_T[:, None] == block_T[None, :], block_T[:, None] > block_T[None, :]
    noisy = jnp.concatenate([own, earlier], axis=1)
    clean = jnp.concatenate([jnp.zeros_like(own), own | earlier], axis=1)
    return jnp.concatenate([noisy, clean])[None]
