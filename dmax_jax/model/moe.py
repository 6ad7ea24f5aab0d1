"""The sparse feed-forward: routed experts and the shared expert."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.expert_tiles import Matrices
from dmax_jax.kernels.routed_experts import routed_experts, takes_digits
from dmax_jax.kernels.row_digits import Digits
from dmax_jax.model.params import Moe
from dmax_jax.model.router import route


def moe(x_BTD: jax.Array, digits: Digits | None, weights: Moe, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the output in parts [P, B, T, D], and the number of rows that chose each expert [E].

    `digits` are those of the rows if the experts want them: see `wants_digits`.
    """
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    choice = route(x_MD, weights.router, weights.expert_bias, config)
    parts = routed_experts(x_MD, choice, *matrices(weights), digits, experts_per_row=config.num_experts_per_tok)
    return parts.reshape(-1, *x_BTD.shape), jnp.sum(choice.weights_ME > 0, axis=0, dtype=jnp.int32)


def wants_digits(x_BTD: jax.Array, weights: Moe) -> bool:
    """Whether the experts multiply digits of such rows."""
    return takes_digits(x_BTD.reshape(-1, x_BTD.shape[-1]), *matrices(weights))


def matrices(weights: Moe) -> tuple[Matrices, Matrices]:
    """The routed experts' and the shared one's."""
    routed, shared = ((mlp.gate, mlp.up, mlp.down) for mlp in (weights.experts, weights.shared))
    return routed, shared
