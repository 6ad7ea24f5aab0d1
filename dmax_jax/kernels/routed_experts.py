"""The routed experts of a layer on a flat list of rows; which implementation runs is decided here."""

import jax
import jax.numpy as jnp

# Up to this many experts it is cheapest, on a CPU and on a GPU, to let every expert see every row.
DENSE_EXPERTS = 8


def routed_experts(
    x_MD: jax.Array,
    gate_EFD: jax.Array,
    up_EFD: jax.Array,
    down_EDF: jax.Array,
    expert_ids_MX: jax.Array,
    weights_MX: jax.Array,
) -> jax.Array:
    """Sums, for every row, the SwiGLU outputs of its X experts times its routing weights.

    A row's expert ids are distinct. Products are in the dtype of `x_MD`, weights in float32. Returns [M, D].
    """
    implementation = dense_experts if gate_EFD.shape[0] <= DENSE_EXPERTS else ragged_experts
    return implementation(x_MD, gate_EFD, up_EFD, down_EDF, expert_ids_MX, weights_MX)


def dense_experts(x_MD, gate_EFD, up_EFD, down_EDF, expert_ids_MX, weights_MX) -> jax.Array:
    """`routed_experts` by two dense products over all experts; the weight of an expert that is not chosen is zero."""
    M = x_MD.shape[0]
    E, F, D = gate_EFD.shape
    chosen_MXE = jax.nn.one_hot(expert_ids_MX, E, dtype=weights_MX.dtype)
    weights_ME = jnp.einsum("mxe,mx->me", chosen_MXE, weights_MX)
    hidden_MEF = jax.nn.silu(x_MD @ gate_EFD.reshape(E * F, D).T) * (x_MD @ up_EFD.reshape(E * F, D).T)
    hidden_MEF = hidden_MEF.reshape(M, E, F) * weights_ME[:, :, None].astype(x_MD.dtype)
    return jnp.einsum("mef,edf->md", hidden_MEF, down_EDF)


def ragged_experts(x_MD, gate_EFD, up_EFD, down_EDF, expert_ids_MX, weights_MX) -> jax.Array:
    """`routed_experts` by sorting the (row, expert) pairs by expert and one grouped product per matrix."""
    E, (M, X) = gate_EFD.shape[0], expert_ids_MX.shape
    ids_P = expert_ids_MX.reshape(-1)  # P = M X pairs
    order_P = jnp.argsort(ids_P, stable=True)
    rows_P = order_P // X
    sizes_E = jnp.bincount(ids_P, length=E).astype(jnp.int32)
    pairs_PD = x_MD[rows_P]
    gate_PF = jax.lax.ragged_dot(pairs_PD, gate_EFD.swapaxes(1, 2), sizes_E)
    up_PF = jax.lax.ragged_dot(pairs_PD, up_EFD.swapaxes(1, 2), sizes_E)
    out_PD = jax.lax.ragged_dot(jax.nn.silu(gate_PF) * up_PF, down_EDF.swapaxes(1, 2), sizes_E)
    # Put back in the order of the rows and summed there: a scatter would add in the rounding and order of its own.
    out_MXD = out_PD[jnp.argsort(order_P)].reshape(M, X, -1)
    return jnp.einsum("mxd,mx->md", out_MXD, weights_MX).astype(x_MD.dtype)
