"""The choice of experts: sigmoid scores, groups first, then experts; everything in float32."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.expert_choice import Choice, choose_experts


def route(x_MD: jax.Array, router_ED: jax.Array, bias_E: jax.Array, config: ModelConfig) -> Choice:
    """Chooses every row's experts, and gives them weights.

    The bias steers the choice alone: groups are ranked by the sum of their two best biased scores, experts are taken
    from the best groups, and the weights are the unbiased scores, normalised and scaled. It may be an array [>= M, E],
    a bias of its own for every row.
    """
    # Products of bfloat16 values are exact in TF32, too, which a GPU's default rounds factors to.
    exact = {x_MD.dtype, router_ED.dtype} == {jnp.dtype(jnp.bfloat16)}
    precision = jax.lax.Precision.DEFAULT if exact else jax.lax.Precision.HIGHEST
    logits_ME = jnp.dot(x_MD.astype(jnp.float32), router_ED.astype(jnp.float32).T, precision=precision)
    return choose_experts(
        logits_ME,
        bias_E,
        groups=config.n_group,
        kept_groups=config.topk_group,
        experts_per_row=config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
    )
