"""The model's own predictions as its next input (Eq. 3); nothing here carries a gradient."""

import functools

import jax
import jax.numpy as jnp

from dmax_jax.model.promotion import promoted_prefix
from dmax_jax.training.corruption import draw_predictions
from dmax_jax.training.losses import Noisy, Problem, Reader, read_noisy


def roll_out(
    reader: Reader, noisy: Noisy, masked_BT: jax.Array, keys_B: jax.Array, problem: Problem, steps: int
) -> Noisy:
    """Lets the model predict the positions in `masked_BT` from its own input, `steps` times."""

    def predict(step: jax.Array, noisy: Noisy) -> Noisy:
        logits_BTV, _ = read_noisy(reader, noisy, problem)
        step_keys_B = jax.vmap(functools.partial(jax.random.fold_in, data=step))(keys_B)
        drawn_BT, confidence_BT = draw_predictions(logits_BTV, step_keys_B, problem.objective.rollout)
        return take_predictions(noisy, drawn_BT, confidence_BT, masked_BT, keys_B, problem)

    return jax.lax.fori_loop(0, steps, predict, noisy) if steps else noisy


def take_predictions(noisy: Noisy, drawn_BT, confidence_BT, masked_BT, keys_B, problem: Problem) -> Noisy:
    """The next input: predictions at the masked positions, or at those that soft decoding would decode by now."""
    objective, mask_id = problem.objective, problem.model.mask_token_id
    update_BT = masked_BT
    if objective.rollout_promotion == "prefix":
        still_BT = masked_BT & (noisy.tokens_BT == mask_id)
        update_BT = masked_BT & ~still_BT | _promoted(still_BT, confidence_BT, keys_B, problem.block_length)
    tokens_BT = jnp.where(update_BT, drawn_BT, noisy.tokens_BT).astype(noisy.tokens_BT.dtype)
    if objective.rollout_embedding == "hard":
        return Noisy(tokens_BT)
    return Noisy(tokens_BT, jnp.where(masked_BT & (tokens_BT != mask_id), confidence_BT, 0))


def first_input(tokens_BT: jax.Array, problem: Problem) -> Noisy:
    """Hard inputs, in the form in which a rollout returns its own."""
    soft = problem.objective.rollout_embedding == "soft"
    return Noisy(tokens_BT, jnp.zeros(tokens_BT.shape, jnp.float32) if soft else None)


def _promoted(masked_BT: jax.Array, confidence_BT: jax.Array, keys_B: jax.Array, block_length: int) -> jax.Array:
    """In every block the prefix that soft decoding promotes, at a threshold of each sample's own from [0, 1]."""
    threshold_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 3)))(keys_B)
    rows_RW, confidence_RW = (x.reshape(-1, block_length) for x in (masked_BT, confidence_BT))
    threshold_R = jnp.repeat(threshold_B, rows_RW.shape[0] // threshold_B.shape[0])
    return promoted_prefix(rows_RW, confidence_RW, threshold_R[:, None]).reshape(masked_BT.shape)
