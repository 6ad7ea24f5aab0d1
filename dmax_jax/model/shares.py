"""A model of which each of several devices has a share, and how what they compute from it is put together.

A share has some query heads and the key heads that they look at, a part of the width of every feed-forward and of every
expert, and a part of the head's vocabulary. What comes out is a part of a sum, or the scores of some tokens. All else
is whole on every device, and each does it for itself; so the residual stream and the tokens are the same everywhere.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dmax_jax.config import ModelConfig
from dmax_jax.kernels.device_sums import Inbox, open_inbox
from dmax_jax.kernels.hopper import is_hopper
from dmax_jax.kernels.projection import project_rows
from dmax_jax.kernels.quantised_weight import Weight
from dmax_jax.kernels.residual_norm import MAX_ROWS, add_and_norm, add_and_norm_over
from dmax_jax.kernels.residual_norm import suits as can_norm
from dmax_jax.kernels.row_digits import Digits
from dmax_jax.model.params import Attention, Params, param_shardings
from dmax_jax.model.quantisation import quantised_shardings, weights_kind
from dmax_jax.sharding import DECODE

AXIS = "tensor"
Result = TypeVar("Result")


def run_on_shares(function: Callable[..., Result], params: Params, config: ModelConfig, mesh: Mesh, *rest) -> Result:
    """Calls `function(params, config, *rest)` on every device, with its share of the parameters.

    The config has the share's numbers of heads. The result is that of any device: it must be the same on all, to the
    last bit, as a loop that ended on one of them alone would leave the others waiting. So all run one executable, and
    are devices of one process.
    """

    def run(params: Params, *rest) -> Result:
        return function(*_own_share(params, config), *rest)

    shardings = param_shardings(config, mesh, DECODE)
    shardings = quantised_shardings(shardings, config) if weights_kind(params) else shardings
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    whole = PartitionSpec()
    in_specs = (specs, *(whole for _ in rest))
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False)(params, *rest)


def shares() -> int:
    """How many devices share the model in the computation that is being traced: 1 outside `run_on_shares`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def is_first_share() -> bool | jax.Array:
    return shares() == 1 or lax.axis_index(AXIS) == 0


def project_over_shares(x: jax.Array, weight: Weight, residual: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The residual plus the product of `x` with a matrix, or, if devices have some columns each, the two apart.

    The product is then a part [1, ...] of what `add_and_norm_over_shares` adds, else None.
    """
    if shares() == 1:
        return project_rows(x, weight, residual), None
    return residual, project_rows(x, weight)[None]


def add_and_norm_over_shares(
    x: jax.Array,
    parts: jax.Array | None,
    weight: jax.Array,
    eps: float,
    inbox: Inbox | None,
    *,
    digits: bool = False,
) -> tuple[jax.Array, jax.Array, Digits | None]:
    """`add_and_norm` of the parts that all devices have."""
    if shares() == 1 or parts is None:
        return add_and_norm(x, parts, weight, eps, digits=digits)
    return add_and_norm_over(AXIS, inbox, x, parts, weight, eps, digits=digits)


def first_token(own_tokens: int) -> int | jax.Array:
    """The id of the first of the `own_tokens` that a share has scores of."""
    return 0 if shares() == 1 else lax.axis_index(AXIS) * own_tokens


def gather_shares(tree):
    """Every share's arrays, stacked along a new first axis."""
    return jax.tree.map(lambda x: x[None], tree) if shares() == 1 else lax.all_gather(tree, AXIS)


def _own_share(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """What is split arrives as the device's part of it; the rows of `qkv`, which belong to three kinds, are taken here.

    With more shares than key heads, several have the same one. Memory for what the devices tell each other is added.
    """
    parts = shares()
    if parts == 1:
        return params, config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    own = dataclasses.replace(
        config, num_attention_heads=heads // parts, num_key_value_heads=max(1, key_heads // parts)
    )
    share, H = lax.axis_index(AXIS), config.head_dim
    kinds = (heads, own.num_attention_heads), *[(key_heads, own.num_key_value_heads)] * 2

    def own_rows(leaf: jax.Array) -> jax.Array:
        rows, start = [], 0
        for count, own_count in kinds:
            rows.append(lax.dynamic_slice_in_dim(leaf, (start + share * count // parts) * H, own_count * H))
            start += count
        return jnp.concatenate(rows)

    def own_heads(weights: Attention) -> Attention:
        return weights.replace(qkv=jax.tree.map(own_rows, weights.qkv))

    layers = tuple(layer.replace(attention=own_heads(layer.attention)) for layer in params.layers)
    # An address means something to devices of one process alone.
    exchanges = is_hopper() and jax.process_count() == 1
    exchanges = exchanges and can_norm(params.embed.dtype, MAX_ROWS, config.hidden_size)
    inbox = open_inbox(AXIS, MAX_ROWS, config.hidden_size) if exchanges else None
    return params.replace(layers=layers, inbox=inbox), own
