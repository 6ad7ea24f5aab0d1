"""What the model sees instead of the clean tokens: masks, random tokens, its own predictions."""

import jax
import jax.numpy as jnp

from dmax_jax.training.batch import Batch


def sample_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """One key per sample from (run key, epoch, index, stream): not from its place in the batch or among the devices."""

    def fold(epoch: jax.Array, index: jax.Array, on_policy: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, epoch), index), on_policy)

    return jax.vmap(fold)(batch.epoch_B, batch.index_B, batch.on_policy_B.astype(jnp.int32))


def draw_masks(batch: Batch, keys_B: jax.Array, low: float, high: float) -> tuple[jax.Array, jax.Array]:
    """Draws each sample's mask rate from [low, high]; returns masked response positions [B, T] and the rates [B]."""

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        rate_key, mask_key = jax.random.split(key)
        rate = jax.random.uniform(rate_key, minval=low, maxval=high)
        return jax.random.uniform(mask_key, (batch.tokens_BT.shape[1],)) < rate, rate

    masked_BT, rate_B = jax.vmap(draw)(keys_B)
    return masked_BT & batch.response_BT, rate_B


def random_tokens(keys_B: jax.Array, length: int, vocab_size: int) -> jax.Array:
    """[B, length] tokens, uniform over the whole vocabulary."""
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (length,), 0, vocab_size))(keys_B)


def draw_predictions(logits_BTV: jax.Array, keys_B: jax.Array, rollout: str) -> tuple[jax.Array, jax.Array]:
    """At every position the most probable token (`argmax`, the official code) or a draw (`sample`, Eq. 3).

    Returns the tokens and their probability, both [B, T].
    """
    if rollout == "argmax":
        drawn_BT = jnp.argmax(logits_BTV, axis=-1)
    else:
        draw = lambda key, logits_TV: jax.random.categorical(jax.random.fold_in(key, 2), logits_TV)  # noqa: E731
        drawn_BT = jax.vmap(draw)(keys_B, logits_BTV)
    chosen_BT = jnp.take_along_axis(logits_BTV, drawn_BT[:, :, None], axis=-1)[:, :, 0]
    return drawn_BT, jnp.exp(chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1))
