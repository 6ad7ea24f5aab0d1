"""Which experts each row takes, and which are taken at all: groups first, then experts."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.hopper import ROWS, differentiated_as, is_hopper, kernel
from dmax_jax.kernels.ranking import largest_pair_sum, ranks

MAX_EXPERTS = 256  # whose scores, biased scores and weights shared memory has room for
MAX_ROWS = ROWS  # of the kernel: one warpgroup has to see all rows, and has registers for no more


@struct.dataclass
class Choice:
    """`ids_E` lists the experts in which some row has a weight, in ascending order; past the count it means nothing."""

    weights_ME: jax.Array  # float32; 0 where a row does not take an expert
    columns_EM: jax.Array  # the same, an expert's weights side by side; filled up with 0 to a multiple of 64 columns
    ids_E: jax.Array
    count_1: jax.Array


def choose_experts(
    scores_ME: jax.Array, biased_ME: jax.Array, *, groups: int, kept_groups: int, experts_per_row: int, scale: float
) -> Choice:
    """Every row takes the experts with the best biased scores in the groups with the best two of them.

    Its weights are its scores in them, divided by their sum and times `scale`. Of equals, the lower index comes first.
    """
    settings = {"groups": groups, "kept_groups": kept_groups, "experts_per_row": experts_per_row, "scale": scale}
    plain = functools.partial(choose_by_ranks, **settings)
    M, E = scores_ME.shape
    if is_hopper() and M <= MAX_ROWS and E <= MAX_EXPERTS and E % ROWS == E % (8 * groups) == 0:
        return differentiated_as(plain)(functools.partial(choose_in_registers, **settings))(scores_ME, biased_ME)
    return plain(scores_ME, biased_ME)


def choose_by_ranks(scores_ME, biased_ME, *, groups: int, kept_groups: int, experts_per_row: int, scale: float):
    """`choose_experts` by comparing all pairs."""
    M, E = scores_ME.shape
    biased_MGN = biased_ME.reshape(M, groups, E // groups)
    kept_MG = ranks(largest_pair_sum(biased_MGN)) < kept_groups
    reachable_ME = jnp.where(kept_MG[:, :, None], biased_MGN, -jnp.inf).reshape(M, E)
    chosen_ME = jnp.where(ranks(reachable_ME) < experts_per_row, scores_ME, 0)
    weights_ME = chosen_ME / (chosen_ME.sum(-1, keepdims=True) + 1e-20) * scale
    return listed(weights_ME)


def listed(weights_ME: jax.Array) -> Choice:
    """The choice that rows with these weights have made."""
    columns_EM = jnp.pad(weights_ME.T, ((0, 0), (0, -len(weights_ME) % ROWS)))
    return Choice(weights_ME, columns_EM, *list_active(jnp.any(weights_ME > 0, axis=0)))


def list_active(active_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the true entries in ascending order [E], and their number [1].

    Compared and summed rather than sorted or scattered, which a GPU does in few small programs.
    """
    order_E = jnp.arange(active_E.shape[0])
    upto_E = jnp.sum((order_E[None, :] <= order_E[:, None]) & active_E[None, :], axis=1, dtype=jnp.int32)
    # The a-th active one is the first up to which there are a + 1, so those up to which there are fewer stand before.
    return jnp.sum(upto_E[None, :] <= order_E[:, None], axis=1, dtype=jnp.int32), upto_E[-1:]


@kernel("groups", "kept_groups", "experts_per_row", "scale")
def choose_in_registers(
    scores_ME, biased_ME, *, groups: int, kept_groups: int, experts_per_row: int, scale: float, interpret=False
) -> Choice:
    """`choose_experts` in one kernel: one warpgroup takes the best expert of every row, then the next, and so on."""
    M, E = scores_ME.shape
    N = E // groups
    layout = plgpu.Layout.WGMMA

    def load(ref, spread=layout):
        return plgpu.load(ref, layout=spread, optimized=False)

    def over_columns(value_M):
        return lax.broadcast_in_dim(value_M, (ROWS, N), [0])

    def choose(biased_GMN, columns_GMN):
        """Marks what is taken with -inf, and returns it beside the groups that are kept."""
        pair_GM = []
        for biased_MN in biased_GMN:
            best_M = jnp.max(biased_MN, axis=1)
            first_M = jnp.min(jnp.where(biased_MN == over_columns(best_M), columns_GMN[0], N), axis=1)
            others_MN = jnp.where(columns_GMN[0] == over_columns(first_M), -jnp.inf, biased_MN)
            pair_GM.append(best_M + jnp.max(others_MN, axis=1))
        kept_GM = []
        for group, own_M in enumerate(pair_GM):
            ahead = [
                jnp.where((other_M >= own_M) if number < group else (other_M > own_M), 1, 0)
                for number, other_M in enumerate(pair_GM)
                if number != group
            ]
            kept_GM.append(sum(ahead, start=jnp.zeros_like(own_M, jnp.int32)) < kept_groups)
        left_GMN = [
            jnp.where(over_columns(kept_M), own, -jnp.inf) for kept_M, own in zip(kept_GM, biased_GMN, strict=True)
        ]

        def take_best(_, left_GMN):
            best_MN = over_columns(jnp.max(functools.reduce(jnp.maximum, left_GMN), axis=1))
            at_GMN = [jnp.where(own == best_MN, at, E) for own, at in zip(left_GMN, columns_GMN, strict=True)]
            first_MN = over_columns(jnp.min(functools.reduce(jnp.minimum, at_GMN), axis=1))
            return [jnp.where(at == first_MN, -jnp.inf, own) for own, at in zip(left_GMN, columns_GMN, strict=True)]

        return lax.fori_loop(0, experts_per_row, take_best, left_GMN), kept_GM

    def body(scores, biased, weights, ids, count, scores_s, biased_s, weights_s, active_s, upto_s, full):
        # The rows that there are; what stands in the others goes through everything and is left out at the end.
        plgpu.copy_gmem_to_smem(scores, scores_s.at[pl.ds(0, M)], full)
        plgpu.copy_gmem_to_smem(biased, biased_s.at[pl.ds(0, M)], full)
        plgpu.barrier_wait(full)
        column_MN = plgpu.broadcasted_iota(jnp.int32, (ROWS, N), 1, layout=layout)
        row_MN = plgpu.broadcasted_iota(jnp.int32, (ROWS, N), 0, layout=layout)
        columns_GMN = [column_MN + group * N for group in range(groups)]
        tiles = [(slice(None), pl.ds(group * N, N)) for group in range(groups)]
        left_GMN, kept_GM = choose([load(biased_s.at[tile]) for tile in tiles], columns_GMN)
        chosen_GMN = [
            jnp.where(over_columns(kept_M) & (left_MN == -jnp.inf) & (row_MN < M), load(scores_s.at[tile]), 0.0)
            for tile, left_MN, kept_M in zip(tiles, left_GMN, kept_GM, strict=True)
        ]
        total_M = jnp.sum(functools.reduce(jnp.add, chosen_GMN), axis=1)
        factor_MN = over_columns(scale / (total_M + 1e-20))
        for tile, chosen_MN in zip(tiles, chosen_GMN, strict=True):
            weight_MN = plgpu.layout_cast(chosen_MN * factor_MN, plgpu.Layout.WGMMA_TRANSPOSED)
            weights_s.at[tile[1]].transpose((1, 0))[...] = weight_MN
            active_s[tile[1]] = jnp.where(jnp.max(chosen_MN, axis=0) > 0, 1, 0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weights_s, weights)

        column_ME = plgpu.broadcasted_iota(jnp.int32, (ROWS, E), 1, layout=layout)
        row_ME = plgpu.broadcasted_iota(jnp.int32, (ROWS, E), 0, layout=layout)
        active_ME = lax.broadcast_in_dim(load(active_s, layout.reduce(0)), (ROWS, E), [1])
        for first in range(0, E, ROWS):
            upto_s[pl.ds(first, ROWS)] = jnp.sum(jnp.where(column_ME <= row_ME + first, active_ME, 0), axis=1)

        plgpu.commit_smem()
        upto_ME = lax.broadcast_in_dim(load(upto_s, layout.reduce(0)), (ROWS, E), [1])
        for first in range(0, E, ROWS):
            ids[pl.ds(first, ROWS)] = jnp.sum(jnp.where(upto_ME <= row_ME + first, 1, 0), axis=1)

        count[0] = upto_s[E - 1]
        plgpu.wait_smem_to_gmem(0)

    columns_EM, ids_E, count_1 = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((E, ROWS), jnp.float32),
            jax.ShapeDtypeStruct((E,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ],
        scratch_types=[
            plgpu.SMEM((ROWS, E), jnp.float32),
            plgpu.SMEM((ROWS, E), jnp.float32),
            plgpu.SMEM((E, ROWS), jnp.float32),
            plgpu.SMEM((E,), jnp.int32),
            plgpu.SMEM((E,), jnp.int32),
            plgpu.Barrier(num_arrivals=2),
        ],
        interpret=interpret,
    )(scores_ME, biased_ME)
    return Choice(columns_EM[:, :M].T, columns_EM, ids_E, count_1)
