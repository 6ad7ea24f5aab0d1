"""The routed experts of many rows: rows are brought together by expert, in tiles that multiply one expert each.

Every expert's weights come from memory once, as with few rows, but multiply only the rows that chose it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.expert_tiles import MAX_ROWS, Matrices, are_alike
from dmax_jax.kernels.grouped_products import places_of_all, tile_hidden, tile_outputs
from dmax_jax.kernels.hopper import multiprocessors
from dmax_jax.kernels.layers import swiglu
from dmax_jax.kernels.row_groups import group_rows


def grouped_experts(
    x_MD: jax.Array,
    choice: Choice,
    experts: Matrices,
    shared: Matrices,
    *,
    experts_per_row: int,
    blocks: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`routed_experts` on a Hopper GPU, by `blocks` blocks of threads (default: one per multiprocessor)."""
    (M, E), D = choice.weights_ME.shape, x_MD.shape[1]
    tile = tile_rows(M * experts_per_row, E)
    groups = group_rows(x_MD, choice, tile, experts_per_row=experts_per_row, interpret=interpret)
    T = len(groups.rows_TRD)
    is_one_more = are_alike(experts, shared) and tile <= M  # whose rows are all rows
    of_all = x_MD if is_one_more else None
    matrices = [(routed, one if is_one_more else None) for routed, one in zip(experts, shared, strict=True)]
    how = {"blocks": blocks or multiprocessors(), "interpret": interpret}
    hidden_TRF = tile_hidden(of_all, groups.rows_TRD, matrices[:2], groups.tiles, groups.weights_P, **how)
    out_TRD = tile_outputs(hidden_TRF, matrices[2], groups.tiles, routed_tiles=T, **how)
    out_PD = out_TRD.reshape(-1, D)
    out_MXD = jnp.where((groups.places_MX >= 0)[:, :, None], out_PD[groups.places_MX].astype(jnp.float32), 0)
    shared_MD = out_PD[places_of_all(M, tile, T)] if is_one_more else swiglu(x_MD, *shared)
    return (jnp.sum(out_MXD, axis=1) + shared_MD.astype(jnp.float32)).astype(x_MD.dtype)


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: room for most experts' rows, as the matrix units multiply as many at once."""
    mean = pairs / experts
    return min(MAX_ROWS, 16 * math.ceil((mean + 2.5 * mean**0.5) / 16))
