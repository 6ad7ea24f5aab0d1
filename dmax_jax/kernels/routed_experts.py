"""The experts of a layer on a flat list of rows; which implementation runs is decided here."""

import functools

import jax
import jax.numpy as jnp

from dmax_jax.kernels.active_experts import list_active
from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.expert_tiles import MAX_ROWS, Matrices, suits_kernels
from dmax_jax.kernels.grouped_experts import grouped_experts
from dmax_jax.kernels.hopper import differentiated_as, filled_up, is_hopper
from dmax_jax.kernels.layers import swiglu
from dmax_jax.kernels.quantised_weight import QuantisedWeight, Weight, factors, project, project_groups
from dmax_jax.kernels.row_digits import Digits
from dmax_jax.kernels.streamed_experts import can_stream, multiplies_digits, streamed_experts

# Up to this many experts it is cheapest, on a CPU and on a GPU, to let every expert see every row.
DENSE_EXPERTS = 8


def routed_experts(
    x_MD: jax.Array,
    choice: Choice,
    experts: Matrices,
    shared: Matrices,
    digits: Digits | None = None,
    *,
    experts_per_row: int,
) -> jax.Array:
    """Sums, for every row, the SwiGLU outputs of its experts times its weights in them, and that of the shared expert.

    `experts` are gate and up [E, F, D] and down [E, D, F], `shared` the same without E and with a width of its own. A
    row has a weight in at most `experts_per_row`. Products are in the dtype of `x_MD`. `digits` are those of the rows
    where `takes_digits`, or are made. The parts are [P, M, D].
    """
    if experts[0].shape[0] <= DENSE_EXPERTS:
        return dense_experts(x_MD, choice, experts, shared)[None]
    plain = functools.partial(ragged_experts, experts_per_row=experts_per_row)
    if is_hopper() and can_stream(x_MD, experts, shared):
        if digits is not None:
            return streamed_experts(x_MD, choice, experts, shared, digits)
        return differentiated_as(functools.partial(in_parts, plain))(streamed_experts)(x_MD, choice, experts, shared)
    if is_hopper() and suits_kernels(x_MD, experts):
        grouped = functools.partial(grouped_experts, experts_per_row=experts_per_row)
        return differentiated_as(plain)(grouped)(x_MD, choice, experts, shared)[None]
    if isinstance(experts[0], QuantisedWeight) and len(x_MD) <= MAX_ROWS:
        return looped_experts(x_MD, choice, experts, shared)[None]
    return plain(x_MD, choice, experts, shared)[None]


def in_parts(plain, *inputs) -> jax.Array:
    """A plain result in as many parts as `streamed_experts` has: the first, and nothing."""
    like = jax.eval_shape(streamed_experts, *inputs)
    return jnp.zeros(like.shape, like.dtype).at[0].set(plain(*inputs).astype(like.dtype))


def takes_digits(x_MD: jax.Array, experts: Matrices, shared: Matrices) -> bool:
    """Whether `routed_experts` has a use for the digits of these rows, or of others of their shape."""
    rows, few = len(x_MD), experts[0].shape[0] <= DENSE_EXPERTS
    can = is_hopper() and not few and can_stream(x_MD, experts, shared)
    return can and filled_up(rows) == rows and multiplies_digits(rows, experts)


def dense_experts(x_MD: jax.Array, choice: Choice, experts: Matrices, shared: Matrices) -> jax.Array:
    """`routed_experts` by products over all experts; the weight of an expert that is not chosen is zero."""
    gate_EFD, up_EFD, down_EDF = experts
    E, F, _ = gate_EFD.shape

    def as_one(weight_EFD: Weight) -> Weight:
        return jax.tree.map(lambda leaf: leaf.reshape(E * F, *leaf.shape[2:]), weight_EFD)

    hidden_MEF = jax.nn.silu(project(x_MD, as_one(gate_EFD))) * project(x_MD, as_one(up_EFD))
    hidden_MEF = hidden_MEF.reshape(-1, E, F) * choice.weights_ME[:, :, None].astype(x_MD.dtype)
    if not isinstance(down_EDF, QuantisedWeight):
        return jnp.einsum("mef,edf->md", hidden_MEF, down_EDF) + swiglu(x_MD, *shared)
    hidden_MEF, values_EDF = factors(hidden_MEF, down_EDF)
    out_MED = jnp.einsum("mef,edf->med", hidden_MEF, values_EDF, preferred_element_type=jnp.float32)
    return jnp.sum(out_MED * down_EDF.scale[None], axis=1).astype(x_MD.dtype) + swiglu(x_MD, *shared)


def looped_experts(x_MD: jax.Array, choice: Choice, experts: Matrices, shared: Matrices) -> jax.Array:
    """`routed_experts` by a loop over the experts that some row chose: each of them multiplies all rows.

    No other expert is read, and no more than one stands in memory in the dtype of `x_MD`.
    """
    ids_E, count = list_active(jnp.any(choice.weights_ME > 0, axis=0))

    def add(place: jax.Array, sum_MD: jax.Array) -> jax.Array:
        expert = ids_E[place]
        out_MD = swiglu(x_MD, *jax.tree.map(lambda leaf: leaf[expert], experts))
        return sum_MD + out_MD.astype(jnp.float32) * choice.weights_ME[:, expert][:, None]

    sum_MD = jax.lax.fori_loop(0, count, add, jnp.zeros(x_MD.shape, jnp.float32))
    return sum_MD.astype(x_MD.dtype) + swiglu(x_MD, *shared)


def ragged_experts(
    x_MD: jax.Array, choice: Choice, experts: Matrices, shared: Matrices, *, experts_per_row: int
) -> jax.Array:
    """`routed_experts` by sorting the (row, expert) pairs by expert and one grouped product per matrix."""
    gate_EFD, up_EFD, down_EDF = experts
    (M, E), X = choice.weights_ME.shape, experts_per_row
    weights_MX, ids_MX = jax.lax.top_k(choice.weights_ME, X)
    ids_P = ids_MX.reshape(-1)  # P = M X pairs
    order_P = jnp.argsort(ids_P, stable=True)
    rows_P = order_P // X
    sizes_E = jnp.bincount(ids_P, length=E).astype(jnp.int32)
    pairs_PD = x_MD[rows_P]
    gate_PF = project_groups(pairs_PD, gate_EFD, sizes_E)
    up_PF = project_groups(pairs_PD, up_EFD, sizes_E)
    out_PD = project_groups(jax.nn.silu(gate_PF) * up_PF, down_EDF, sizes_E)
    # Put back in the order of the rows and summed there: a scatter would add in the rounding and order of its own.
    out_MXD = out_PD[jnp.argsort(order_P)].reshape(M, X, -1)
    return jnp.einsum("mxd,mx->md", out_MXD, weights_MX).astype(x_MD.dtype) + swiglu(x_MD, *shared)
