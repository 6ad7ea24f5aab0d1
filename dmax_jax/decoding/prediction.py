"""What a forward's logits say about every position, in one pass over them."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dmax_jax.model.shares import first_token, gather_shares, shares


@struct.dataclass
class Prediction:
    tokens_BW: jax.Array  # the most probable (lowest id on ties), or drawn
    confidence_BW: jax.Array  # their probability at temperature 1, in float32
    others_BW: jax.Array  # the most probable tokens but the mask


@struct.dataclass
class Best:
    """The best of some tokens: its score and id, and the sum of exp(score - best score) over all of them."""

    score: jax.Array
    token: jax.Array
    sum: jax.Array


def predict(logits_BWV: jax.Array, mask_id: int | jax.Array, temperature: float = 0.0, keys_B=None) -> Prediction:
    """Reads every position's prediction from logits [B, W, V].

    Of logits that several devices share, every one has the columns of its own tokens. A temperature above 0 needs
    `keys_B`.
    """
    logits_BWV = logits_BWV.astype(jnp.float32)
    is_mask_BWV = token_ids(logits_BWV) == mask_id
    mask_BW = jnp.full(logits_BWV.shape[:2], mask_id, jnp.int32)
    # The mask stands apart, so that the best token with it and without it come from the same pass.
    others, mask = join_shares(
        best_token(jnp.where(is_mask_BWV, -jnp.inf, logits_BWV)),
        Best(logit_of(logits_BWV, mask_BW), mask_BW, jnp.ones(mask_BW.shape)),
    )
    best = better(others, mask)
    if temperature == 0:
        return Prediction(best.token, 1 / best.sum, others.token)
    scores_BWV = logits_BWV / temperature + gumbel_noise(keys_B, logits_BWV.shape)
    (drawn,) = join_shares(best_token(scores_BWV))
    logit_BW = jnp.max(gather_shares(logit_of(logits_BWV, drawn.token)), axis=0)
    return Prediction(drawn.token, jnp.exp(logit_BW - best.score) / best.sum, others.token)


def best_token(scores_BWV: jax.Array) -> Best:
    """The best of the last axis: [B, W]."""
    return _reduce(Best(scores_BWV, token_ids(scores_BWV), jnp.ones_like(scores_BWV)), axis=2)


def better(one: Best, two: Best) -> Best:
    """The best of both, position by position; of equals the lower token."""
    is_one = (one.score > two.score) | ((one.score == two.score) & (one.token < two.token))
    # The lower score's part of the sum. Of two infinite scores, the difference would be no number.
    scale = jnp.where(one.score == two.score, 1, jnp.exp(-jnp.abs(one.score - two.score)))
    return Best(
        jnp.where(is_one, one.score, two.score),
        jnp.where(is_one, one.token, two.token),
        jnp.where(is_one, one.sum + two.sum * scale, two.sum + one.sum * scale),
    )


def join_shares(*bests: Best) -> tuple[Best, ...]:
    """Each the best of all shares."""
    return bests if shares() == 1 else tuple(_reduce(best, axis=0) for best in gather_shares(bests))


def _reduce(best: Best, axis: int) -> Best:
    none = Best(jnp.float32(-jnp.inf), jnp.int32(jnp.iinfo(jnp.int32).max), jnp.float32(0))
    return lax.reduce(best, none, better, (axis,))


def token_ids(logits_BWV: jax.Array) -> jax.Array:
    """The id of every logit's token, in the shape of the logits."""
    return first_token(logits_BWV.shape[-1]) + lax.broadcasted_iota(jnp.int32, logits_BWV.shape, 2)


def logit_of(logits_BWV: jax.Array, tokens_BW: jax.Array) -> jax.Array:
    """One token's logit at every position: [B, W]; -inf on the shares that don't have it."""
    V = logits_BWV.shape[-1]
    at_BW = tokens_BW - first_token(V)
    own_BW = jnp.take_along_axis(logits_BWV, jnp.clip(at_BW, 0, V - 1)[:, :, None], axis=-1)[:, :, 0]
    return jnp.where((at_BW >= 0) & (at_BW < V), own_BW, -jnp.inf)


def gumbel_noise(keys_B: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """Noise that makes the best token a draw, that of jax.random.categorical: of all tokens, then the share's own."""
    _, W, V = shape
    noise_BWV = jax.vmap(lambda key: jax.random.gumbel(key, (W, shares() * V)))(keys_B)
    return lax.dynamic_slice_in_dim(noise_BWV, first_token(V), V, axis=-1)
