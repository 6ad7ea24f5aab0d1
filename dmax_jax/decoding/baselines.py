"""The decoders that soft parallel decoding is compared with; what they commit is final.

A step returns the block after it and, row by row, whether the method is done with it [B].
"""

import jax
import jax.numpy as jnp

from dmax_jax.decoding.block import Block
from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, ThresholdPolicy
from dmax_jax.decoding.prediction import Prediction, token_ids

# The official code lowers its threshold to the best confidence less this, so near ties are committed together.
TIE = 1e-5


def threshold_step(
    block: Block, prediction: Prediction, policy: ThresholdPolicy, mask_id: int
) -> tuple[Block, jax.Array]:
    """Commits every masked position at or above the threshold, at least the best one.

    A position that predicts the mask itself is no candidate.
    """
    confidence_BW = prediction.confidence_BW
    candidate_BW = (block.tokens_BW == mask_id) & (prediction.tokens_BW != mask_id)
    best_B1 = jnp.max(confidence_BW, axis=-1, keepdims=True, where=candidate_BW, initial=0)
    commit_BW = candidate_BW & (confidence_BW >= jnp.minimum(policy.threshold, best_B1 - TIE))
    return _commit(block, commit_BW, prediction, mask_id)


def hierarchical_step(
    block: Block, prediction: Prediction, policy: HierarchicalPolicy, mask_id: int
) -> tuple[Block, jax.Array]:
    """Commits all masked positions above the threshold, each masked run's best above the low one, and the best of all.

    A position that predicts the mask itself competes for best but is not committed, as in the official code; a block
    whose only choices are such positions ends.
    """
    confidence_BW = prediction.confidence_BW
    masked_BW = block.tokens_BW == mask_id
    choice_BW = jnp.where(masked_BW, confidence_BW, -jnp.inf)
    best_BW = jax.nn.one_hot(jnp.argmax(choice_BW, axis=-1), choice_BW.shape[-1], dtype=bool)
    run_best_BW = _best_of_run(choice_BW, masked_BW) & (choice_BW > policy.low_threshold)
    commit_BW = masked_BW & ((choice_BW > policy.threshold) | run_best_BW | best_BW)
    return _commit(block, commit_BW & (prediction.tokens_BW != mask_id), prediction, mask_id)


def add_credit(
    block: Block, logits_BWV: jax.Array, prediction: Prediction, policy: CreditPolicy, mask_id: int
) -> tuple[Block, jax.Array]:
    """Credits what the logits predict (at temperature 0); raises those of masked positions by `alpha log(1 + credit)`.

    Threshold decoding goes on with the raised logits.
    """
    masked_BW1 = (block.tokens_BW == mask_id)[:, :, None]
    top_BWV = token_ids(logits_BWV) == prediction.tokens_BW[:, :, None]
    earned_BWV = jnp.where(masked_BW1 & top_BWV, prediction.confidence_BW[:, :, None] ** policy.gamma, 0)
    credit_BWV = policy.decay * block.credit_BWV + earned_BWV
    raised_BWV = logits_BWV + jnp.where(masked_BW1, policy.alpha * jnp.log1p(credit_BWV), 0)
    return block.replace(credit_BWV=credit_BWV), raised_BWV


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


def _commit(block: Block, commit_BW: jax.Array, prediction: Prediction, mask_id: int) -> tuple[Block, jax.Array]:
    tokens_BW = jnp.where(commit_BW, prediction.tokens_BW, block.tokens_BW)
    done_B = ~jnp.any(tokens_BW == mask_id, axis=-1) | ~jnp.any(commit_BW, axis=-1)
    return block.replace(tokens_BW=tokens_BW, confidence_BW=prediction.confidence_BW), done_B
