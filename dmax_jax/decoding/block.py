"""The block under refinement, and what every method reads from a forward's logits."""

import jax
import jax.numpy as jnp
from flax import struct

from dmax_jax.model.shares import first_token, logsumexp_over_shares, of_best_share, shares


@struct.dataclass
class Block:
    """One block per row. `active_BW` marks the positions that were masked at entry; it never changes."""

    tokens_BW: jax.Array
    active_BW: jax.Array
    embeddings_BWD: jax.Array  # input of the next forward
    confidence_BW: jax.Array  # probability of each position's prediction in the last forward
    step_B: jax.Array  # forwards spent on the block
    stopped_B: jax.Array  # the method's own stop rule
    credit_BWV: jax.Array | None = None  # of the credit method


def enter_block(tokens_BW: jax.Array, embed, mask_id: int, credit_BWV: jax.Array | None = None) -> Block:
    """A fresh block: hard embeddings, nothing decoded."""
    none_B = jnp.zeros(tokens_BW.shape[0], jnp.int32)
    credit_BWV = None if credit_BWV is None else jnp.zeros_like(credit_BWV)
    unsure_BW = jnp.zeros(tokens_BW.shape, jnp.float32)
    return Block(tokens_BW, tokens_BW == mask_id, embed(tokens_BW), unsure_BW, none_B, none_B > 0, credit_BWV)


def freeze(frozen_B: jax.Array, old, new):
    """`new`, with the rows in `frozen_B` as they are in `old`; both are pytrees of arrays whose first axis is B."""

    def keep(old_leaf: jax.Array, new_leaf: jax.Array) -> jax.Array:
        return jnp.where(frozen_B.reshape(frozen_B.shape + (1,) * (new_leaf.ndim - 1)), old_leaf, new_leaf)

    return jax.tree.map(keep, old, new)


def predict_tokens(logits_BWV: jax.Array, temperature: float, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns tokens [B, W] (lowest index on ties) and their probability at temperature 1 [B, W], in float32.

    Of logits that several devices share, every one has the columns of its own tokens.
    """
    logits_BWV = logits_BWV.astype(jnp.float32)
    scores_BWV = logits_BWV
    if temperature > 0:
        scores_BWV = logits_BWV / temperature + gumbel_noise(keys_B, logits_BWV.shape)
    tokens_BW, chosen_BW = best_tokens(scores_BWV, logits_BWV)
    return tokens_BW, jnp.exp(chosen_BW - logsumexp_over_shares(logits_BWV))


def best_tokens(scores_BWV: jax.Array, logits_BWV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens with the highest scores (lowest index on ties), and their logits: [B, W] each."""
    best_BW = jnp.argmax(scores_BWV, axis=-1).astype(jnp.int32)
    score_BW, logit_BW = (
        jnp.take_along_axis(x_BWV, best_BW[:, :, None], axis=-1)[:, :, 0] for x_BWV in (scores_BWV, logits_BWV)
    )
    share_BW, best_BW, logit_BW = of_best_share(score_BW, best_BW, logit_BW)
    return share_BW * scores_BWV.shape[-1] + best_BW, logit_BW


def gumbel_noise(keys_B: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Noise that makes the best token a draw, that of jax.random.categorical: of all tokens, then the share's own."""
    _, W, V = shape
    noise_BWV = jax.vmap(lambda key: jax.random.gumbel(key, (W, shares() * V)))(keys_B)
    return jax.lax.dynamic_slice_in_dim(noise_BWV, first_token(V), V, axis=-1)
