"""On-policy uniform training and the objectives it is compared with: gradients of one batch.

Everything that carries no gradient (noise, rollout) is computed outside the differentiated function `sequence_loss`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dmax_jax.config import ModelConfig, ObjectiveConfig
from dmax_jax.model.masks import two_stream_mask
from dmax_jax.model.params import Params, cast_params
from dmax_jax.model.transformer import embed, transformer, unembed
from dmax_jax.training.batch import Batch, supervised_positions
from dmax_jax.training.corruption import draw_masks, draw_predictions, random_tokens, sample_keys


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side of a loss: model, grid, objective and dtype of the computation."""

    model: ModelConfig
    objective: ObjectiveConfig
    block_length: int
    dtype: str


@struct.dataclass
class Gradients:
    grads: Params
    metrics: dict[str, jax.Array]
    loads: tuple[jax.Array, ...]  # of the experts, one [E] per sparse layer


@struct.dataclass
class Forward:
    logits_BTV: jax.Array  # of the noisy half
    loads: tuple[jax.Array, ...]


@struct.dataclass
class Evidence:
    """What a loss leaves behind beside its value."""

    loss_B: jax.Array
    argmax_BT: jax.Array
    drawn_BT: jax.Array  # predictions for a rollout
    loads: tuple[jax.Array, ...]


def two_stream_forward(params: Params, inputs_BT: jax.Array, clean_BT: jax.Array, problem: Problem) -> Forward:
    """Runs `[inputs | clean]` under the training mask; a position's logits predict its own token (no shift)."""
    T = clean_BT.shape[1]
    # From the float32 table: its gradient sums thousands of masks into one row, which bfloat16 can't add up.
    x_BTD = embed(params, jnp.concatenate([inputs_BT, clean_BT], axis=1))
    params = cast_params(params, problem.dtype)
    positions = jnp.tile(jnp.arange(T), 2)[None]
    out = transformer(params, x_BTD, positions, two_stream_mask(T, problem.block_length), problem.model)
    return Forward(unembed(params, out.hidden_BTD[:, :T]), out.loads)


# A rule of positions: logits -> the weight of every position's cross entropy, and a term added per sequence.
Extra = Callable[[jax.Array], jax.Array]


def sequence_loss(
    params: Params,
    inputs_BT: jax.Array,
    batch: Batch,
    weights_BT: jax.Array,
    keys_B: jax.Array,
    problem: Problem,
    extra: Extra | None = None,
) -> tuple[jax.Array, Evidence]:
    """Mean over sequences of the weighted cross entropy of the clean tokens; `weights_BT` sum to 1 over a sequence."""
    forward = two_stream_forward(params, inputs_BT, batch.tokens_BT, problem)
    entropy_BT = optax.softmax_cross_entropy_with_integer_labels(forward.logits_BTV, batch.tokens_BT)
    loss_B = jnp.sum(entropy_BT * weights_BT, axis=1)
    if extra is not None:
        loss_B = loss_B + extra(forward.logits_BTV)
    logits_BTV = jax.lax.stop_gradient(forward.logits_BTV)
    drawn_BT = draw_predictions(logits_BTV, keys_B, problem.objective.rollout)
    return jnp.mean(loss_B), Evidence(loss_B, jnp.argmax(logits_BTV, axis=-1), drawn_BT, forward.loads)


loss_gradients = jax.value_and_grad(sequence_loss, has_aux=True)


def objective_gradients(params: Params, batch: Batch, key: jax.Array, problem: Problem) -> Gradients:
    """Gradients of the run's objective on one batch; see the functions in `OBJECTIVES`."""
    keys_B = sample_keys(key, batch)
    masked_BT, rate_B = draw_masks(batch, keys_B, problem.objective.mask_rate_low, problem.objective.mask_rate_high)
    return OBJECTIVES[problem.objective.kind](params, batch, masked_BT, rate_B, keys_B, problem)


def mdlm(params, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> Gradients:
    """Masked diffusion: cross entropy at masked supervised positions; optionally each sample over its mask rate."""
    supervised_BT = _supervised(batch, problem)
    weights_BT = _mean_weights(supervised_BT & masked_BT)
    if problem.objective.inverse_rate_weight:
        weights_BT = (supervised_BT & masked_BT) * _mean_weights(supervised_BT) / rate_B[:, None]
    inputs_BT = _mask(batch, masked_BT, problem)
    (loss, seen), grads = loss_gradients(params, inputs_BT, batch, weights_BT, keys_B, problem)
    metrics = {"loss": loss, "masked_loss": loss, **_accuracy(seen, batch, supervised_BT & masked_BT)}
    return Gradients(grads, metrics, seen.loads)


def dparallel(params, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> Gradients:
    """Masked diffusion plus certainty forcing: the entropy at masked positions that are already predicted right."""
    chosen_BT = _supervised(batch, problem) & masked_BT

    def certainty(logits_BTV: jax.Array) -> jax.Array:
        log_probs_BTV = jax.nn.log_softmax(logits_BTV)
        entropy_BT = -jnp.sum(jnp.exp(log_probs_BTV) * log_probs_BTV, axis=-1)
        right_BT = chosen_BT & (jnp.argmax(logits_BTV, axis=-1) == batch.tokens_BT)
        return problem.objective.certainty * jnp.sum(entropy_BT * _mean_weights(right_BT), axis=1)

    inputs_BT, weights_BT = _mask(batch, masked_BT, problem), _mean_weights(chosen_BT)
    (loss, seen), grads = loss_gradients(params, inputs_BT, batch, weights_BT, keys_B, problem, certainty)
    return Gradients(grads, {"loss": loss, **_accuracy(seen, batch, chosen_BT)}, seen.loads)


def uniform(params, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> Gradients:
    """Uniform diffusion: random vocabulary tokens take the masks' places, cross entropy at all supervised positions."""
    random_BT = random_tokens(keys_B, batch.tokens_BT.shape[1], problem.model.vocab_size)
    inputs_BT = jnp.where(masked_BT, random_BT, batch.tokens_BT)
    supervised_BT = _supervised(batch, problem)
    (loss, seen), grads = loss_gradients(params, inputs_BT, batch, _mean_weights(supervised_BT), keys_B, problem)
    metrics = {"loss": loss, "random_loss": loss, **_accuracy(seen, batch, supervised_BT & masked_BT)}
    return Gradients(grads, metrics, seen.loads)


def oput(params, batch: Batch, masked_BT, rate_B, keys_B, problem: Problem) -> Gradients:
    """On-Policy Uniform Training in the run's schedule."""
    schedule = {"joint": oput_joint, "alternating": oput_alternating}[problem.objective.schedule]
    return schedule(params, batch, masked_BT, keys_B, problem)


def oput_joint(params, batch: Batch, masked_BT, keys_B, problem: Problem) -> Gradients:
    """Eq. 6: masked and predicted input of the same draw; the masked loss's forward is the rollout's first step."""
    supervised_BT = _supervised(batch, problem)
    weights_BT = _mean_weights(supervised_BT)
    masked_inputs_BT = _mask(batch, masked_BT, problem)
    (masked_loss, first), masked_grads = loss_gradients(params, masked_inputs_BT, batch, weights_BT, keys_B, problem)
    predicted_BT = jnp.where(masked_BT, first.drawn_BT, batch.tokens_BT)
    predicted_BT = roll_out(
        params, predicted_BT, batch, masked_BT, keys_B, problem, problem.objective.rollout_steps - 1
    )
    (predicted_loss, second), grads = loss_gradients(params, predicted_BT, batch, weights_BT, keys_B, problem)
    metrics = {
        "loss": masked_loss + predicted_loss,
        "masked_loss": masked_loss,
        "predicted_loss": predicted_loss,
        **_repairs(predicted_BT, second, batch, supervised_BT & masked_BT),
    }
    loads = jax.tree.map(jnp.add, first.loads, second.loads)
    return Gradients(jax.tree.map(jnp.add, masked_grads, grads), metrics, loads)


def oput_alternating(params, batch: Batch, masked_BT, keys_B, problem: Problem) -> Gradients:
    """The official code's schedule: one loss per row, on predicted input where `on_policy_B`, else on masked input."""
    supervised_BT = _supervised(batch, problem)
    masked_inputs_BT = _mask(batch, masked_BT, problem)
    on_policy_B1 = batch.on_policy_B[:, None]
    predicted_BT = jax.lax.cond(  # a part without on-policy rows needs no rollout
        jnp.any(batch.on_policy_B),
        lambda: roll_out(params, masked_inputs_BT, batch, masked_BT, keys_B, problem, problem.objective.rollout_steps),
        lambda: masked_inputs_BT,
    )
    inputs_BT = jnp.where(on_policy_B1, predicted_BT, masked_inputs_BT)
    weights_BT = _mean_weights(supervised_BT)
    (loss, seen), grads = loss_gradients(params, inputs_BT, batch, weights_BT, keys_B, problem)
    metrics = {
        "loss": loss,
        "masked_loss": _mean_where(seen.loss_B, ~batch.on_policy_B),
        "predicted_loss": _mean_where(seen.loss_B, batch.on_policy_B),
        **_repairs(inputs_BT, seen, batch, supervised_BT & masked_BT & on_policy_B1),
    }
    return Gradients(grads, metrics, seen.loads)


OBJECTIVES = {"mdlm": mdlm, "dparallel": dparallel, "uniform": uniform, "oput": oput}


def roll_out(
    params: Params, inputs_BT: jax.Array, batch: Batch, masked_BT, keys_B, problem: Problem, steps: int
) -> jax.Array:
    """Replaces the masked positions by the model's predictions from its input, `steps` times (Eq. 3)."""

    def predict(step: jax.Array, inputs_BT: jax.Array) -> jax.Array:
        logits_BTV = two_stream_forward(params, inputs_BT, batch.tokens_BT, problem).logits_BTV
        step_keys_B = jax.vmap(functools.partial(jax.random.fold_in, data=step))(keys_B)
        drawn_BT = draw_predictions(logits_BTV, step_keys_B, problem.objective.rollout)
        return jnp.where(masked_BT, drawn_BT, inputs_BT).astype(inputs_BT.dtype)

    return jax.lax.fori_loop(0, steps, predict, inputs_BT) if steps else inputs_BT


def _supervised(batch: Batch, problem: Problem) -> jax.Array:
    return supervised_positions(batch, problem.model.eos_token_id, problem.objective.supervised_padding)


def _mask(batch: Batch, masked_BT: jax.Array, problem: Problem) -> jax.Array:
    return jnp.where(masked_BT, problem.model.mask_token_id, batch.tokens_BT)


def _mean_weights(chosen_BT: jax.Array) -> jax.Array:
    """Equal weights that sum to 1 over a sequence's chosen positions, or to 0 if there are none."""
    return chosen_BT / jnp.maximum(jnp.sum(chosen_BT, axis=1, keepdims=True), 1)


def _mean_where(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)


def _accuracy(seen: Evidence, batch: Batch, chosen_BT: jax.Array) -> dict[str, jax.Array]:
    return {"accuracy": _mean_where(seen.argmax_BT == batch.tokens_BT, chosen_BT)}


def _repairs(inputs_BT: jax.Array, seen: Evidence, batch: Batch, chosen_BT: jax.Array) -> dict[str, jax.Array]:
    """How often the rollout was right, and how many of its errors the model then predicts right."""
    wrong_BT = chosen_BT & (inputs_BT != batch.tokens_BT)
    return {
        "rollout_accuracy": _mean_where(inputs_BT == batch.tokens_BT, chosen_BT),
        "repaired": _mean_where(seen.argmax_BT == batch.tokens_BT, wrong_BT),
    }
