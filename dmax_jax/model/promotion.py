"""Which masked positions of a block soft parallel decoding turns into tokens."""

import jax
import jax.numpy as jnp


def promoted_prefix(masked_BW: jax.Array, confidence_BW: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """The masked positions left of the first unsure masked one; the left-most masked position if there are none."""
    unsure_BW = masked_BW & (confidence_BW < threshold)
    # A prefix has the left-most position in it.
    return masked_BW & ((jnp.cumsum(unsure_BW, axis=-1) == 0) | (jnp.cumsum(masked_BW, axis=-1) == 1))


def promoted_anywhere(masked_BW: jax.Array, confidence_BW: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Every sure masked position; the first most confident masked position if there are none."""
    sure_BW = masked_BW & (confidence_BW >= threshold)
    best_B = jnp.argmax(jnp.where(masked_BW, confidence_BW, -1), axis=-1)
    best_BW = masked_BW & jax.nn.one_hot(best_B, masked_BW.shape[-1], dtype=bool)
    return jnp.where(jnp.any(sure_BW, axis=-1, keepdims=True), sure_BW, best_BW)
