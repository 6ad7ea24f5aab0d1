"""Soft Parallel Decoding: one step of a block (paper, section 3.3), and its ablations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dmax_jax.decoding.block import Block
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.decoding.prediction import Prediction
from dmax_jax.model.promotion import promoted_anywhere, promoted_prefix
from dmax_jax.model.soft_embedding import soft_embedding


def spd_step(block: Block, prediction: Prediction, policy: SpdPolicy, mask_id: int) -> tuple[Block, jax.Array]:
    """Promotes a prefix of the masked region and predicts every decoded token again.

    Returns the block and whether it stops [B]: when every active position is accepted or nothing changed. The write of
    that last step stands.
    """
    predicted_BW, confidence_BW = prediction.tokens_BW, prediction.confidence_BW
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
    return block.replace(tokens_BW=tokens_BW, confidence_BW=confidence_BW), rules[policy.stop]


def embed_softly(block: Block, embed: Callable[[jax.Array], jax.Array], policy: SpdPolicy, mask_id: int) -> jax.Array:
    """Input of the block's next forward [B, W, D]: what is decoded is mixed with the mask, the rest is hard.

    `embed` maps tokens [...] to embeddings [..., D]. A decoded token is the last forward's prediction, so the block's
    confidence is its own.
    """
    hard_BWD = embed(block.tokens_BW)
    if policy.embedding == "hard":
        return hard_BWD
    soft_BW = block.active_BW & (block.tokens_BW != mask_id)
    mask_D = embed(jnp.asarray(mask_id))
    mixed_BWD = soft_embedding(hard_BWD, mask_D, block.confidence_BW, renormalise=policy.embedding == "soft")
    return jnp.where(soft_BW[:, :, None], mixed_BWD.astype(hard_BWD.dtype), hard_BWD)
