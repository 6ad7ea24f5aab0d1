"""The decoders that soft parallel decoding is compared with; what they commit is final."""

import jax
import jax.numpy as jnp

from dmax_jax.decoding.block import Block, predict_tokens
from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, ThresholdPolicy
from dmax_jax.model.shares import first_token

# The official code lowers its threshold to the best confidence less this, so near ties are committed together.
TIE = 1e-5


def threshold_step(
    block: Block, logits_BWV: jax.Array, keys_B: jax.Array, embed, policy: ThresholdPolicy, mask_id: int
) -> Block:
    """Commits every masked position at or above the threshold, at least the best one.

    A position that predicts the mask itself is no candidate.
    """
    predicted_BW, confidence_BW = predict_tokens(logits_BWV, policy.temperature, keys_B)
    candidate_BW = (block.tokens_BW == mask_id) & (predicted_BW != mask_id)
    best_B1 = jnp.max(confidence_BW, axis=-1, keepdims=True, where=candidate_BW, initial=0)
    commit_BW = candidate_BW & (confidence_BW >= jnp.minimum(policy.threshold, best_B1 - TIE))
    return _commit(block, commit_BW, predicted_BW, confidence_BW, embed, mask_id)


def hierarchical_step(
    block: Block, logits_BWV: jax.Array, keys_B: jax.Array, embed, policy: HierarchicalPolicy, mask_id: int
) -> Block:
    """Commits all masked positions above the threshold, each masked run's best above the low one, and the best of all.

    A position that predicts the mask itself competes for best but is not committed, as in the official code; a block
    whose only choices are such positions ends.
    """
    predicted_BW, confidence_BW = predict_tokens(logits_BWV, policy.temperature, keys_B)
    masked_BW = block.tokens_BW == mask_id
    choice_BW = jnp.where(masked_BW, confidence_BW, -jnp.inf)
    best_BW = jax.nn.one_hot(jnp.argmax(choice_BW, axis=-1), choice_BW.shape[-1], dtype=bool)
    run_best_BW = _best_of_run(choice_BW, masked_BW) & (choice_BW > policy.low_threshold)
    commit_BW = masked_BW & ((choice_BW > policy.threshold) | run_best_BW | best_BW)
    return _commit(block, commit_BW & (predicted_BW != mask_id), predicted_BW, confidence_BW, embed, mask_id)


def credit_step(
    block: Block, logits_BWV: jax.Array, keys_B: jax.Array, embed, policy: CreditPolicy, mask_id: int
) -> Block:
    """Threshold decoding after adding `alpha log(1 + credit)` to the logits of masked positions."""
    top_BW, confidence_BW = predict_tokens(logits_BWV, 0.0, keys_B)
    masked_BW1 = (block.tokens_BW == mask_id)[:, :, None]
    V = logits_BWV.shape[-1]
    top_BWV = jax.nn.one_hot(top_BW - first_token(V), V)
    earned_BWV = jnp.where(masked_BW1, top_BWV * confidence_BW[:, :, None] ** policy.gamma, 0)
    credit_BWV = policy.decay * block.credit_BWV + earned_BWV
    raised_BWV = logits_BWV + jnp.where(masked_BW1, policy.alpha * jnp.log1p(credit_BWV), 0)
    return threshold_step(block.replace(credit_BWV=credit_BWV), raised_BWV, keys_B, embed, policy, mask_id)


def _best_of_run(confidence_BW: jax.Array, masked_BW: jax.Array) -> jax.Array:
    """True at the first most confident position of every contiguous run of masked positions."""
    W = masked_BW.shape[-1]
    run_BW = jnp.cumsum(~masked_BW, axis=-1)  # equal within a run
    same_BWW = (run_BW[:, :, None] == run_BW[:, None, :]) & masked_BW[:, None, :]
    order_W = jnp.arange(W)
    earlier_WW = (order_W[None, :] < order_W[:, None])[None]
    other_BWW, own_BWW = confidence_BW[:, None, :], confidence_BW[:, :, None]
    beaten_BWW = same_BWW & ((other_BWW > own_BWW) | ((other_BWW == own_BWW) & earlier_WW))
    return masked_BW & ~jnp.any(beaten_BWW, axis=-1)


def _commit(block: Block, commit_BW: jax.Array, predicted_BW, confidence_BW, embed, mask_id: int) -> Block:
    tokens_BW = jnp.where(commit_BW, predicted_BW, block.tokens_BW)
    done_B = ~jnp.any(tokens_BW == mask_id, axis=-1) | ~jnp.any(commit_BW, axis=-1)
    return block.replace(
        tokens_BW=tokens_BW, embeddings_BWD=embed(tokens_BW), confidence_BW=confidence_BW, stopped_B=done_B
    )
