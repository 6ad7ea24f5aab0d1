"""The sparse feed-forward: routed experts plus the shared expert."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.routed_experts import routed_experts
from dmax_jax.model.layers import swiglu
from dmax_jax.model.params import Moe
from dmax_jax.model.router import route


def moe(x_BTD: jax.Array, weights: Moe, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, D] and the number of rows that chose each expert [E]."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    ids_MX, weights_MX = route(x_MD, weights.router, weights.expert_bias, config)
    experts = weights.experts
    routed_MD = routed_experts(x_MD, experts.gate, experts.up, experts.down, ids_MX, weights_MX)
    # Compared rather than scattered: on a GPU, additions to a handful of addresses wait for each other.
    load_E = jnp.sum(ids_MX[:, :, None] == jnp.arange(config.num_experts)[None, None], axis=(0, 1), dtype=jnp.int32)
    return (routed_MD + swiglu(x_MD, weights.shared)).reshape(x_BTD.shape), load_E
