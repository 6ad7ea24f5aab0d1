"""The order of short rows, by comparing all pairs: one fused program on a GPU, where a sort takes several."""

import jax
import jax.numpy as jnp


def ranks(x_MN: jax.Array) -> jax.Array:
    """Each entry's place in its row, from 0 for the largest on; of equals, the lower index first. [M, N]"""
    order_N = jnp.arange(x_MN.shape[-1])
    own_MN1, other_M1N = x_MN[:, :, None], x_MN[:, None, :]
    earlier_1NN = (order_N[None, :] < order_N[:, None])[None]
    return jnp.sum((other_M1N > own_MN1) | ((other_M1N == own_MN1) & earlier_1NN), axis=-1)


def largest_pair_sum(x_MGN: jax.Array) -> jax.Array:
    """Sum of the two largest entries of the last axis, or the only one. [M, G]"""
    N = x_MGN.shape[-1]
    if N == 1:
        return x_MGN[:, :, 0]
    sums_MGNN = x_MGN[:, :, :, None] + x_MGN[:, :, None, :]
    return jnp.max(jnp.where(jnp.eye(N, dtype=bool)[None, None], -jnp.inf, sums_MGNN), axis=(-2, -1))
