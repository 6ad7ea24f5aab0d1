"""The block under refinement."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Block:
    """One block per row. `active_BW` marks the positions that were masked at entry; it never changes."""

    tokens_BW: jax.Array
    active_BW: jax.Array
    confidence_BW: jax.Array  # probability of each position's prediction in the last forward
    step_B: jax.Array  # forwards spent on the block
    credit_BWV: jax.Array | None = None  # of the credit method


def enter_block(tokens_BW: jax.Array, mask_id: int, credit_BWV: jax.Array | None = None) -> Block:
    """A fresh block: nothing decoded."""
    none_B = jnp.zeros(tokens_BW.shape[0], jnp.int32)
    credit_BWV = None if credit_BWV is None else jnp.zeros_like(credit_BWV)
    unsure_BW = jnp.zeros(tokens_BW.shape, jnp.float32)
    return Block(tokens_BW, tokens_BW == mask_id, unsure_BW, none_B, credit_BWV)


def freeze(frozen_B: jax.Array, old, new):
    """`new`, with the rows in `frozen_B` as they are in `old`; both are pytrees of arrays whose first axis is B."""

    def keep(old_leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        return jnp.where(frozen_B.reshape(frozen_B.shape + (1,) * (new_leaf.ndim - 1)), old_leaf, new_leaf)

    return jax.tree.map(keep, old, new)
