"""Means that can be taken in parts: the metrics of a batch whose parts hold different numbers of what is counted."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Mean:
    """A sum and how much it counts; means of parts are added by adding their leaves."""

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """0 where nothing was counted."""
        return self.total / jnp.maximum(self.weight, 1)


def mean_of(values: jax.Array) -> Mean:
    return Mean(jnp.sum(values), jnp.float32(values.size))


def mean_where(values: jax.Array, where: jax.Array) -> Mean:
    """The mean of the values at the positions that `where` marks."""
    return Mean(jnp.sum(values * where, dtype=jnp.float32), jnp.sum(where, dtype=jnp.float32))
