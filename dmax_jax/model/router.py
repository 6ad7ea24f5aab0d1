"""The choice of experts: sigmoid scores, groups first, then experts; everything in float32."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.expert_choice import Choice, choose_experts
from dmax_jax.kernels.projection import project_rows


def route(x_MD: jax.Array, router_ED: jax.Array, bias_E: jax.Array, config: ModelConfig) -> Choice:
    """Chooses every row's experts, and gives them weights.

    The bias steers the choice alone: groups are ranked by the sum of their two best biased scores, experts are taken
    from the best groups, and the weights are the unbiased scores, normalised and scaled. It may be an array [>= M, E],
    a bias of its own for every row.
    """
    # Products of bfloat16 values are exact in float32, and in TF32, which a GPU's default rounds float32 factors to.
    if {x_MD.dtype, router_ED.dtype} == {jnp.dtype(jnp.bfloat16)}:
        logits_ME = project_rows(x_MD, router_ED, dtype=jnp.float32)
    else:
        x_MD, router_ED = (array.astype(jnp.float32) for array in (x_MD, router_ED))
        logits_ME = jnp.dot(x_MD, router_ED.T, precision=jax.lax.Precision.HIGHEST)
    return choose_experts(
        logits_ME,
        bias_E,
        groups=config.n_group,
        kept_groups=config.topk_group,
        experts_per_row=config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
    )
