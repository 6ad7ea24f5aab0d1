"""Rows as whole numbers of two digits, so that the matrix units multiply int8 weights as they are, by int8.

A row is about (its largest magnitude / 16256) * (128 high + low), both digits int8. That is finer than bfloat16 for
entries above about a 64th of the largest one. Sums of up to 2**17 products with int8 weights are exact in int32.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

BASE = 128
LARGEST = 127 * BASE  # high digits up to 127, low ones from -64 to 64
MOST_ROWS = 64  # sums for more rows' digits than these take more registers than a thread has


@struct.dataclass
class Digits:
    """The rows of an array [M, D]."""

    values: jax.Array  # int8 [2M, D]: high digits of all rows, then low ones
    largest: jax.Array  # float32 [M], the rows' largest magnitudes


def in_digits(x_MD: jax.Array) -> Digits:
    x_MD = x_MD.astype(jnp.float32)
    largest_M = jnp.max(jnp.abs(x_MD), axis=1)
    number_MD = jnp.round(x_MD * (LARGEST / jnp.where(largest_M > 0, largest_M, 1))[:, None])
    high_MD = jnp.round(number_MD / BASE)
    return Digits(jnp.concatenate([high_MD, number_MD - BASE * high_MD]).astype(jnp.int8), largest_M)


def joined(sums, largest_M):
    """The sums for rows, float32 [64, M], of those for their digits, int32 [64, 2M], within a kernel."""
    rows = largest_M.shape[0]
    high, low = (lax.slice(sums, (0, first), (sums.shape[0], first + rows)) for first in (0, rows))
    total = BASE * high.astype(jnp.float32) + low.astype(jnp.float32)  # 128 times an int32 could be too large
    return total * lax.broadcast_in_dim(largest_M / LARGEST, total.shape, [1])
