"""The k largest values of short rows."""

import jax
import jax.numpy as jnp

# Up to this length a row is ranked by comparing all pairs in one fused kernel; a GPU would sort it in several.
SHORT = 16


def top_k_ids(x_MN: jax.Array, k: int) -> jax.Array:
    """Indices [M, k] of each row's k largest values, largest first, the lower index first on ties."""
    N = x_MN.shape[-1]
    if N > SHORT:
        return jax.lax.top_k(x_MN, k)[1]
    order_N = jnp.arange(N)
    own_MN1, other_M1N = x_MN[:, :, None], x_MN[:, None, :]
    earlier_1NN = (order_N[None, :] < order_N[:, None])[None]
    rank_MN = jnp.sum((other_M1N > own_MN1) | ((other_M1N == own_MN1) & earlier_1NN), axis=-1)
    at_rank_MkN = rank_MN[:, None, :] == jnp.arange(k)[None, :, None]
    return jnp.sum(jnp.where(at_rank_MkN, order_N[None, None, :], 0), axis=-1)
