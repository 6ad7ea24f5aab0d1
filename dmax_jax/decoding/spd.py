"""Soft Parallel Decoding: one step of a block (paper, section 3.3), and its ablations."""

import jax
import jax.numpy as jnp

from dmax_jax.decoding.block import Block, predict_tokens
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.model.soft_embedding import soft_embedding


def spd_step(block: Block, logits_BWV: jax.Array, keys_B: jax.Array, embed, policy: SpdPolicy, mask_id: int) -> Block:
    """Promotes a prefix of the masked region, predicts every decoded token again, and softens what is decoded.

    `embed` maps tokens [...] to embeddings [..., D]. A block stops when every active position is accepted or nothing
    changed; the write of that last step stands.
    """
    predicted_BW, confidence_BW = predict_tokens(logits_BWV, policy.temperature, keys_B)
    masked_BW = block.tokens_BW == mask_id
    promoted = promoted_prefix if policy.contiguous_prefix else promoted_anywhere
    update_BW = promoted(masked_BW, confidence_BW, policy.threshold) | (block.active_BW & ~masked_BW)
    changed_BW = update_BW & (predicted_BW != block.tokens_BW)
    tokens_BW = jnp.where(update_BW, predicted_BW, block.tokens_BW)

    accepted_B = jnp.all((confidence_BW >= policy.accept_threshold) | ~block.active_BW, axis=-1)
    consistent_B = ~jnp.any(changed_BW, axis=-1)
    rules = {"either": accepted_B | consistent_B, "consistency": consistent_B, "confidence": accepted_B}
    embeddings_BWD = embed(tokens_BW)
    if policy.embedding != "hard":
        soft_BW = block.active_BW & (tokens_BW != mask_id)
        mixed_BWD = soft_embedding(
            embed(predicted_BW),
            embed(jnp.asarray(mask_id)),
            confidence_BW,
            renormalise=policy.embedding == "soft",
        )
        embeddings_BWD = jnp.where(soft_BW[:, :, None], mixed_BWD.astype(embeddings_BWD.dtype), embeddings_BWD)
    return block.replace(
        tokens_BW=tokens_BW,
        embeddings_BWD=embeddings_BWD,
        confidence_BW=confidence_BW,
        stopped_B=rules[policy.stop],
    )


def promoted_prefix(masked_BW: jax.Array, confidence_BW: jax.Array, threshold: float) -> jax.Array:
    """The masked positions left of the first unsure masked one; the left-most masked position if there are none."""
    unsure_BW = masked_BW & (confidence_BW < threshold)
    prefix_BW = masked_BW & (jnp.cumsum(unsure_BW, axis=-1) == 0)
    leftmost_BW = masked_BW & (jnp.cumsum(masked_BW, axis=-1) == 1)
    return jnp.where(jnp.any(prefix_BW, axis=-1, keepdims=True), prefix_BW, leftmost_BW)


def promoted_anywhere(masked_BW: jax.Array, confidence_BW: jax.Array, threshold: float) -> jax.Array:
    """Every sure masked position; the first most confident masked position if there are none."""
    sure_BW = masked_BW & (confidence_BW >= threshold)
    best_B = jnp.argmax(jnp.where(masked_BW, confidence_BW, -1), axis=-1)
    best_BW = masked_BW & jax.nn.one_hot(best_B, masked_BW.shape[-1], dtype=bool)
    return jnp.where(jnp.any(sure_BW, axis=-1, keepdims=True), sure_BW, best_BW)
