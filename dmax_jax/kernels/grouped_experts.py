"""The routed experts of many rows: rows are brought together by expert, in tiles that multiply one expert each.

Every expert's weights come from memory once, as with few rows, but multiply only the rows that chose it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from dmax_jax.kernels.expert_choice import Choice
from dmax_jax.kernels.expert_tiles import MAX_ROWS, Matrices
from dmax_jax.kernels.grouped_products import tile_hidden, tile_outputs
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
    tiles = groups.ids_T, groups.upto_E
    how = {"blocks": blocks or multiprocessors(), "interpret": interpret}
    hidden_TRF = tile_hidden(groups.rows_TRD, tuple(experts[:2]), *tiles, groups.weights_P, **how)
    out_TRD = tile_outputs(hidden_TRF, experts[2], *tiles, **how)
    out_MXD = out_TRD.reshape(-1, D)[groups.places_MX].astype(jnp.float32)
    out_MXD = jnp.where((groups.places_MX >= 0)[:, :, None], out_MXD, 0)
    return jnp.sum(out_MXD, axis=1).astype(x_MD.dtype) + swiglu(x_MD, *shared)


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: room for most experts' rows, as the matrix units multiply as many at once."""
    mean = pairs / experts
    return min(MAX_ROWS, 16 * math.ceil((mean + 2.5 * mean**0.5) / 16))
