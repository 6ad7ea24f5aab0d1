"""A batch of clean sequences, and which of its positions the loss sees."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Batch:
    """Sequences padded with EOS. `index_B` and `epoch_B` name a sample's noise; `on_policy_B` is for `alternating`."""

    tokens_BT: jax.Array
    prompt_length_B: jax.Array
    index_B: jax.Array
    epoch_B: jax.Array
    on_policy_B: jax.Array

    @property
    def response_BT(self) -> jax.Array:
        """True from the end of the prompt on, padding included."""
        return jnp.arange(self.tokens_BT.shape[1])[None] >= self.prompt_length_B[:, None]


def supervised_positions(batch: Batch, eos_id: int, padding: int) -> jax.Array:
    """[B, T]: the response, with at most the first `padding` positions of the trailing run of EOS."""
    position_T = jnp.arange(batch.tokens_BT.shape[1])
    last_B = jnp.max(jnp.where(batch.tokens_BT != eos_id, position_T[None], -1), axis=1)
    return batch.response_BT & (position_T[None] <= last_B[:, None] + padding)
