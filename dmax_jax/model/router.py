"""The choice of experts: sigmoid scores, groups first, then experts; everything in float32."""

import jax
import jax.numpy as jnp

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.top_k import top_k_ids


def route(x_MD: jax.Array, router_ED: jax.Array, bias_E: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns each row's expert ids [M, X] and their weights [M, X] in float32.

    The bias steers the choice alone: groups are ranked by the sum of their two best biased scores, experts are taken
    from the best groups, and the weights are the unbiased scores, normalised and scaled. It may be an array [>= M, E],
    a bias of its own for every row.
    """
    scores_ME = jax.nn.sigmoid(
        jnp.dot(x_MD.astype(jnp.float32), router_ED.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    )
    M, E = scores_ME.shape
    bias_ME = bias_E[None] if bias_E.ndim == 1 else bias_E[:M]
    biased_MGE = (scores_ME + bias_ME).reshape(M, config.n_group, E // config.n_group)
    group_score_MG = _sum_of_two_best(biased_MGE)
    groups = top_k_ids(group_score_MG, config.topk_group)
    kept_MG = jax.nn.one_hot(groups, config.n_group, dtype=bool).any(axis=1)
    pick_ME = jnp.where(kept_MG[:, :, None], biased_MGE, -jnp.inf).reshape(M, E)
    ids_MX = top_k_ids(pick_ME, config.num_experts_per_tok)
    # Compared rather than gathered: the gradient of a gather adds into addresses that wait for each other.
    is_chosen_MXE = ids_MX[:, :, None] == jnp.arange(E)[None, None, :]
    chosen_MX = jnp.sum(jnp.where(is_chosen_MXE, scores_ME[:, None, :], 0), axis=-1)
    weights_MX = chosen_MX / (chosen_MX.sum(-1, keepdims=True) + 1e-20)
    return ids_MX, weights_MX * config.routed_scaling_factor


def _sum_of_two_best(x_MGE: jax.Array) -> jax.Array:
    """[M, G]: by maxima rather than by sorting; groups of one expert have its score."""
    best_MG1 = jnp.max(x_MGE, axis=-1, keepdims=True)
    if x_MGE.shape[-1] == 1:
        return best_MG1[:, :, 0]
    first_MG1 = jnp.argmax(x_MGE, axis=-1, keepdims=True)
    others_MGE = jnp.where(jnp.arange(x_MGE.shape[-1])[None, None] == first_MG1, -jnp.inf, x_MGE)
    return best_MG1[:, :, 0] + jnp.max(others_MGE, axis=-1)
