"""On-policy uniform training and the objectives it is compared with: gradients of one batch.

Everything that carries no gradient (noise, rollout) is computed outside the differentiated functions `read_clean` and
`sequence_loss`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from dmax_jax.model.params import Params
from dmax_jax.training.batch import Batch, supervised_positions
from dmax_jax.training.corruption import draw_masks, random_tokens, sample_keys
from dmax_jax.training.losses import Evidence, Loads, Noisy, Problem, Reader, loss_gradients, read_clean
from dmax_jax.training.mean import Mean, mean_of, mean_where
from dmax_jax.training.rollout import first_input, roll_out, take_predictions


@struct.dataclass
class Gradients:
    grads: Params
    metrics: dict[str, Mean]
    loads: Loads


@struct.dataclass
class StreamGradients:
    """What an objective makes of a batch: gradients with respect to the parameters and the clean stream."""

    grads: Reader
    metrics: dict[str, Mean]
    loads: Loads


def objective_gradients(params: Params, batch: Batch, key: jax.Array, problem: Problem) -> Gradients:
    """Gradients of the run's objective on one batch; see the functions in `OBJECTIVES`."""
    keys_B = sample_keys(key, batch)
    masked_BT, rate_B = draw_masks(batch, keys_B, problem.objective.mask_rate_low, problem.objective.mask_rate_high)
    return batch_gradients(params, batch, masked_BT, rate_B, keys_B, problem)


def batch_gradients(params: Params, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> Gradients:
    """Runs the clean stream forward once for all losses and rollouts of the objective, and backward once for all."""
    clean, pull_back, loads = jax.vjp(lambda p: read_clean(p, batch.tokens_BT, problem), params, has_aux=True)
    losses = OBJECTIVES[problem.objective.kind](Reader(params, clean), batch, masked_BT, rate_B, keys_B, problem)
    (clean_grads,) = pull_back(losses.grads.clean)
    grads, loads = jax.tree.map(jnp.add, (losses.grads.params, losses.loads), (clean_grads, loads))
    return Gradients(grads, losses.metrics, loads)


def mdlm(reader: Reader, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> StreamGradients:
    """Masked diffusion: cross entropy at masked supervised positions; optionally each sample over its mask rate."""
    supervised_BT = _supervised(batch, problem)
    weights_BT = _mean_weights(supervised_BT & masked_BT)
    if problem.objective.inverse_rate_weight:
        weights_BT = (supervised_BT & masked_BT) * _mean_weights(supervised_BT) / rate_B[:, None]
    inputs_BT = _mask(batch, masked_BT, problem)
    (_, seen), grads = loss_gradients(reader, Noisy(inputs_BT), batch, weights_BT, keys_B, problem)
    metrics = {
        "loss": mean_of(seen.loss_B),
        "masked_loss": mean_of(seen.loss_B),
        **_accuracy(seen, batch, supervised_BT & masked_BT),
    }
    return StreamGradients(grads, metrics, seen.loads)


def dparallel(reader: Reader, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> StreamGradients:
    """Masked diffusion plus certainty forcing: the entropy at masked positions that are already predicted right."""
    chosen_BT = _supervised(batch, problem) & masked_BT
    inputs_BT, weights_BT = _mask(batch, masked_BT, problem), _mean_weights(chosen_BT)
    certainty = _certainty(batch, chosen_BT, problem)
    (_, seen), grads = loss_gradients(reader, Noisy(inputs_BT), batch, weights_BT, keys_B, problem, certainty)
    return StreamGradients(grads, {"loss": mean_of(seen.loss_B), **_accuracy(seen, batch, chosen_BT)}, seen.loads)


def uniform(reader: Reader, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> StreamGradients:
    """Uniform diffusion: random vocabulary tokens take the masks' places, cross entropy at all supervised positions."""
    random_BT = random_tokens(keys_B, batch.tokens_BT.shape[1], problem.model.vocab_size)
    inputs_BT = jnp.where(masked_BT, random_BT, batch.tokens_BT)
    supervised_BT = _supervised(batch, problem)
    (_, seen), grads = loss_gradients(reader, Noisy(inputs_BT), batch, _mean_weights(supervised_BT), keys_B, problem)
    metrics = {
        "loss": mean_of(seen.loss_B),
        "random_loss": mean_of(seen.loss_B),
        **_accuracy(seen, batch, supervised_BT & masked_BT),
    }
    return StreamGradients(grads, metrics, seen.loads)


def oput(reader: Reader, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> StreamGradients:
    """On-Policy Uniform Training in the run's schedule."""
    schedule = {"joint": oput_joint, "alternating": oput_alternating}[problem.objective.schedule]
    return schedule(reader, batch, masked_BT, keys_B, problem)


def oput_joint(reader: Reader, batch: Batch, masked_BT, keys_B, problem: Problem) -> StreamGradients:
    """Eq. 6: masked and predicted input of the same draw; the masked loss's forward is the rollout's first step."""
    supervised_BT = _supervised(batch, problem)
    weights_BT = _mean_weights(supervised_BT)
    certainty = _certainty(batch, supervised_BT & masked_BT, problem)
    masked = first_input(_mask(batch, masked_BT, problem), problem)
    (_, first), masked_grads = loss_gradients(reader, masked, batch, weights_BT, keys_B, problem, certainty)
    predicted = take_predictions(masked, first.drawn_BT, first.confidence_BT, masked_BT, keys_B, problem)
    predicted = roll_out(reader, predicted, masked_BT, keys_B, problem, problem.objective.rollout_steps - 1)
    (_, second), grads = loss_gradients(reader, predicted, batch, weights_BT, keys_B, problem, certainty)
    metrics = {
        "loss": mean_of(first.loss_B + second.loss_B),
        "masked_loss": mean_of(first.loss_B),
        "predicted_loss": mean_of(second.loss_B),
        **_repairs(predicted.tokens_BT, second, batch, supervised_BT & masked_BT, problem),
    }
    loads = jax.tree.map(jnp.add, first.loads, second.loads)
    return StreamGradients(jax.tree.map(jnp.add, masked_grads, grads), metrics, loads)


def oput_alternating(reader: Reader, batch: Batch, masked_BT, keys_B, problem: Problem) -> StreamGradients:
    """The official code's schedule: one loss per row, on predicted input where `on_policy_B`, else on masked input."""
    supervised_BT = _supervised(batch, problem)
    masked = first_input(_mask(batch, masked_BT, problem), problem)
    predicted = jax.lax.cond(  # a part without on-policy rows needs no rollout
        jnp.any(batch.on_policy_B),
        lambda: roll_out(reader, masked, masked_BT, keys_B, problem, problem.objective.rollout_steps),
        lambda: masked,
    )
    on_policy_B1 = batch.on_policy_B[:, None]
    inputs = jax.tree.map(lambda own, other: jnp.where(on_policy_B1, own, other), predicted, masked)
    weights_BT, certainty = _mean_weights(supervised_BT), _certainty(batch, supervised_BT & masked_BT, problem)
    (_, seen), grads = loss_gradients(reader, inputs, batch, weights_BT, keys_B, problem, certainty)
    metrics = {
        "loss": mean_of(seen.loss_B),
        "masked_loss": mean_where(seen.loss_B, ~batch.on_policy_B),
        "predicted_loss": mean_where(seen.loss_B, batch.on_policy_B),
        **_repairs(inputs.tokens_BT, seen, batch, supervised_BT & masked_BT & on_policy_B1, problem),
    }
    return StreamGradients(grads, metrics, seen.loads)


OBJECTIVES = {"mdlm": mdlm, "dparallel": dparallel, "uniform": uniform, "oput": oput}


def _supervised(batch: Batch, problem: Problem) -> jax.Array:
    return supervised_positions(batch, problem.model.eos_token_id, problem.objective.supervised_padding)


def _mask(batch: Batch, masked_BT: jax.Array, problem: Problem) -> jax.Array:
    return jnp.where(masked_BT, problem.model.mask_token_id, batch.tokens_BT)


def _mean_weights(chosen_BT: jax.Array) -> jax.Array:
    """Equal weights that sum to 1 over a sequence's chosen positions, or to 0 if there are none."""
    return chosen_BT / jnp.maximum(jnp.sum(chosen_BT, axis=1, keepdims=True), 1)


def _certainty(batch: Batch, chosen_BT: jax.Array, problem: Problem) -> Callable[[jax.Array], jax.Array] | None:
    """Certainty forcing (dParallel): the mean entropy at the chosen positions that are predicted right, weighted."""
    if not problem.objective.certainty:
        return None

    def certainty(logits_BTV: jax.Array) -> jax.Array:
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        entropy_BT = -jnp.sum(jnp.exp(log_probs_BTV) * log_probs_BTV, axis=-1)
        right_BT = chosen_BT & (jnp.argmax(logits_BTV, axis=-1) == batch.tokens_BT)
        return problem.objective.certainty * jnp.sum(entropy_BT * _mean_weights(right_BT), axis=1)

    return certainty


def _accuracy(seen: Evidence, batch: Batch, chosen_BT: jax.Array) -> dict[str, Mean]:
    return {"accuracy": mean_where(seen.argmax_BT == batch.tokens_BT, chosen_BT)}


def _repairs(inputs_BT: jax.Array, seen: Evidence, batch: Batch, chosen_BT, problem: Problem) -> dict[str, Mean]:
    """How often the rollout's tokens were right, and how many of the wrong ones the model then predicts right."""
    chosen_BT = chosen_BT & (inputs_BT != problem.model.mask_token_id)
    wrong_BT = chosen_BT & (inputs_BT != batch.tokens_BT)
    return {
        "rollout_accuracy": mean_where(inputs_BT == batch.tokens_BT, chosen_BT),
        "repaired": mean_where(seen.argmax_BT == batch.tokens_BT, wrong_BT),
    }
