"""The differentiated side of training: two-stream forward, loss of a sequence, and the rollout that feeds it."""

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
from dmax_jax.training.batch import Batch
from dmax_jax.training.corruption import draw_predictions


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side of a loss: model, grid, objective and dtype of the computation."""

    model: ModelConfig
    objective: ObjectiveConfig
    block_length: int
    dtype: str


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


def sequence_loss(
    params: Params,
    inputs_BT: jax.Array,
    batch: Batch,
    weights_BT: jax.Array,
    keys_B: jax.Array,
    problem: Problem,
    extra: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Evidence]:
    """Mean over sequences of the weighted cross entropy of the clean tokens; `weights_BT` sum to 1 over a sequence.

    `extra` maps the logits to a term added to each sequence's loss.
    """
    forward = two_stream_forward(params, inputs_BT, batch.tokens_BT, problem)
    cross_entropy_BT = optax.softmax_cross_entropy_with_integer_labels(forward.logits_BTV, batch.tokens_BT)
    loss_B = jnp.sum(cross_entropy_BT * weights_BT, axis=1)
    if extra is not None:
        loss_B = loss_B + extra(forward.logits_BTV)
    logits_BTV = jax.lax.stop_gradient(forward.logits_BTV)
    drawn_BT = draw_predictions(logits_BTV, keys_B, problem.objective.rollout)
    return jnp.mean(loss_B), Evidence(loss_B, jnp.argmax(logits_BTV, axis=-1), drawn_BT, forward.loads)


loss_gradients = jax.value_and_grad(sequence_loss, has_aux=True)


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
