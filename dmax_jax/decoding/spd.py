"""Soft Parallel Decoding: one step of a block (paper, section 3.3), and its ablations."""

import jax
import jax.numpy as jnp

from dmax_jax.decoding.block import Block, predict_tokens
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.model.promotion import promoted_anywhere, promoted_prefix
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
    rules = {
        "either": accepted_B | consistent_B,
        "consistency": consistent_B,
        "confidence": accepted_B,
        "never": jnp.zeros_like(accepted_B),
    }
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
