"""The differentiated side of training: the clean stream, the noisy stream over it, and the loss of a sequence."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dmax_jax.config import ModelConfig, ObjectiveConfig
from dmax_jax.model.cache import KVCache
from dmax_jax.model.masks import BlockPattern
from dmax_jax.model.params import Params, cast_params
from dmax_jax.model.soft_embedding import soft_embedding
from dmax_jax.model.transformer import Output, embed, transformer, unembed
from dmax_jax.training.batch import Batch
from dmax_jax.training.corruption import draw_predictions

Loads = tuple[jax.Array, ...]  # of the experts, one [E] per sparse layer


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side of a loss: model, grid, objective and dtype of the computation."""

    model: ModelConfig
    objective: ObjectiveConfig
    block_length: int
    dtype: str


@struct.dataclass
class Reader:
    """What a noisy stream is run with: the parameters, and the clean stream's keys and values that it sees."""

    params: Params
    clean: KVCache


@struct.dataclass
class Noisy:
    """The noisy stream's inputs. A position with a confidence above 0 is softened towards the mask by it."""

    tokens_BT: jax.Array
    confidence_BT: jax.Array | None = None  # None: every embedding is hard


@struct.dataclass
class Evidence:
    """What a loss leaves behind beside its value."""

    loss_B: jax.Array
    argmax_BT: jax.Array
    drawn_BT: jax.Array  # predictions for a rollout
    confidence_BT: jax.Array  # and their probability
    loads: Loads


def read_clean(params: Params, clean_BT: jax.Array, problem: Problem) -> tuple[KVCache, Loads]:
    """Runs the clean stream, in which a block sees itself and the earlier ones."""
    out = _run_stream(params, embed(params, clean_BT), problem, None)
    return out.kv, out.loads


def read_noisy(reader: Reader, noisy: Noisy, problem: Problem) -> tuple[jax.Array, Loads]:
    """Runs a noisy stream, in which a block sees itself and the earlier clean ones; returns float32 logits [B, T, V].

    A position's logits predict its own token (no shift).
    """
    # From the float32 table: its gradient sums thousands of masks into one row, which bfloat16 can't add up.
    x_BTD = embed(reader.params, noisy.tokens_BT)
    if noisy.confidence_BT is not None:
        mask_D = embed(reader.params, jnp.asarray(problem.model.mask_token_id))
        is_soft_BT1 = (noisy.confidence_BT > 0)[:, :, None]
        # What is not softened is not given to the norms, whose gradient at a vector of zeros is no number.
        soft_BTD = soft_embedding(jnp.where(is_soft_BT1, x_BTD, 1), mask_D, noisy.confidence_BT)
        x_BTD = jnp.where(is_soft_BT1, soft_BTD, x_BTD)
    out = _run_stream(reader.params, x_BTD, problem, reader.clean)
    return unembed(cast_params(reader.params, problem.dtype), out.hidden_BTD), out.loads


def _run_stream(params: Params, x_BTD: jax.Array, problem: Problem, clean: KVCache | None) -> Output:
    positions = jnp.arange(x_BTD.shape[1])[None]
    params = cast_params(params, problem.dtype)
    return transformer(params, x_BTD, positions, BlockPattern(problem.block_length), problem.model, cache=clean)


def sequence_loss(
    reader: Reader,
    noisy: Noisy,
    batch: Batch,
    weights_BT: jax.Array,
    keys_B: jax.Array,
    problem: Problem,
    extra: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Evidence]:
    """Mean over sequences of the weighted cross entropy of the clean tokens; `weights_BT` sum to 1 over a sequence.

    `extra` maps the logits to a term added to each sequence's loss.
    """
    logits_BTV, loads = read_noisy(reader, noisy, problem)
    cross_entropy_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.tokens_BT)
    loss_B = jnp.sum(cross_entropy_BT * weights_BT, axis=1)
    if extra is not None:
        loss_B = loss_B + extra(logits_BTV)
    logits_BTV = jax.lax.stop_gradient(logits_BTV)
    drawn_BT, confidence_BT = draw_predictions(logits_BTV, keys_B, problem.objective.rollout)
    return jnp.mean(loss_B), Evidence(loss_B, jnp.argmax(logits_BTV, axis=-1), drawn_BT, confidence_BT, loads)


loss_gradients = jax.value_and_grad(sequence_loss, has_aux=True)  # with respect to parameters and clean stream
