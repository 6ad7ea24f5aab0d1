"""The choice of experts: sigmoid scores, groups first, then experts; everything in float32."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig


def route(x_MD: jax.Array, router_ED: jax.Array, bias_E: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns each row's expert ids [M, X] and their weights [M, X] in float32.

    The bias steers the choice alone: groups are ranked by the sum of their two best biased scores, experts are taken
    from the best groups, and the weights are the unbiased scores, normalised and scaled.
    """
    scores_ME = jax.nn.sigmoid(
        jnp.dot(x_MD.astype(jnp.float32), router_ED.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    )
    M, E = scores_ME.shape
    biased_MGE = (scores_ME + bias_E[None, :]).reshape(M, config.n_group, E // config.n_group)
    group_score_MG = jax.lax.top_k(biased_MGE, min(2, E // config.n_group))[0].sum(-1)
    groups = jax.lax.top_k(group_score_MG, config.topk_group)[1]
    kept_MG = jax.nn.one_hot(groups, config.n_group, dtype=bool).any(axis=1)
    pick_ME = jnp.where(kept_MG[:, :, None], biased_MGE, -jnp.inf).reshape(M, E)
    ids_MX = jax.lax.top_k(pick_ME, config.num_experts_per_tok)[1]
    chosen_MX = jnp.take_along_axis(scores_ME, ids_MX, axis=-1)
    weights_MX = chosen_MX / (chosen_MX.sum(-1, keepdims=True) + 1e-20)
    return ids_MX, weights_MX * config.routed_scaling_factor
