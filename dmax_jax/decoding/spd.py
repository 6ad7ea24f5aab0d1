"""Soft Parallel Decoding: one step of a block (paper, section 3.3)."""

import jax
import jax.numpy as jnp

from dmax_jax.decoding.block import Block, predict_tokens
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.decoding.soft_embedding import soft_embedding


def spd_step(block: Block, logits_BWV: jax.Array, keys_B: jax.Array, embed, policy: SpdPolicy, mask_id: int) -> Block:
    """Promotes a prefix of the masked region, predicts every decoded token again, and softens what is decoded.

    `embed` maps tokens [...] to embeddings [..., D]. A block stops when every active position is accepted or nothing
    changed; the write of that last step stands.
    """
    predicted_BW, confidence_BW = predict_tokens(logits_BWV, policy.temperature, keys_B)
    masked_BW = block.tokens_BW == mask_id
    promote_BW = promoted_prefix(masked_BW, confidence_BW, policy.threshold)
    update_BW = promote_BW | (block.active_BW & ~masked_BW)
    changed_BW = update_BW & (predicted_BW != block.tokens_BW)
    tokens_BW = jnp.where(update_BW, predicted_BW, block.tokens_BW)

    accepted_B = jnp.all((confidence_BW >= policy.accept_threshold) | ~block.active_BW, axis=-1)
    soft_BW = block.active_BW & (tokens_BW != mask_id)
    mixed_BWD = soft_embedding(embed(predicted_BW), embed(jnp.asarray(mask_id)), confidence_BW)
    hard_BWD = embed(tokens_BW)
    return block.replace(
        tokens_BW=tokens_BW,
        embeddings_BWD=jnp.where(soft_BW[:, :, None], mixed_BWD.astype(hard_BWD.dtype), hard_BWD),
        stopped_B=accepted_B | ~jnp.any(changed_BW, axis=-1),
    )


def promoted_prefix(masked_BW: jax.Array, confidence_BW: jax.Array, threshold: float) -> jax.Array:
    """The masked positions left of the first unsure masked one; the left-most masked position if there are none."""
    unsure_BW = masked_BW & (confidence_BW < threshold)
    prefix_BW = masked_BW & (jnp.cumsum(unsure_BW, axis=-1) == 0)
    leftmost_BW = masked_BW & (jnp.cumsum(masked_BW, axis=-1) == 1)
    return jnp.where(jnp.any(prefix_BW, axis=-1, keepdims=True), prefix_BW, leftmost_BW)
