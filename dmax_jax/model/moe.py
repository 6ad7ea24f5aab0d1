"""The sparse feed-forward: routed experts and the shared expert."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.routed_experts import routed_experts
from dmax_jax.model.params import Moe
from dmax_jax.model.router import route


def moe(x_BTD: jax.Array, weights: Moe, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, D] and the number of rows that chose each expert [E]."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    choice = route(x_MD, weights.router, weights.expert_bias, config)
    matrices = ((mlp.gate, mlp.up, mlp.down) for mlp in (weights.experts, weights.shared))
    out_MD = routed_experts(x_MD, choice, *matrices, experts_per_row=config.num_experts_per_tok)
    return out_MD.reshape(x_BTD.shape), jnp.sum(choice.weights_ME > 0, axis=0, dtype=jnp.int32)
