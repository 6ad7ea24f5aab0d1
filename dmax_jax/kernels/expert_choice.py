"""Which experts each row takes: groups first, then experts."""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.hopper import ROWS, differentiated_as, filled_up, is_hopper, scatter
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier
from dmax_jax.kernels.ranking import largest_pair_sum, ranks

MAX_EXPERTS = 256  # of the kernel: a block of threads has a warpgroup for every 64


@struct.dataclass
class Choice:
    """What a layer's rows have chosen among its experts."""

    weights_ME: jax.Array  # float32; 0 where a row does not take an expert
    columns_EM: jax.Array  # the same, an expert's weights side by side; filled up with 0 to `filled_up(M)` columns
    zeros_E: jax.Array  # int32, for the experts' kernel to count in: a program that only wrote them would cost more


def choose_experts(
    logits_ME: jax.Array, bias: jax.Array, *, groups: int, kept_groups: int, experts_per_row: int, scale: float
) -> Choice:
    """Every row takes the experts with the best biased scores in the groups with the best two of them.

    An expert's score is the sigmoid of its logit; the bias, `[E]` or an own one for every row `[>= M, E]`, is added to
    it. The row's weights are its scores in the experts it takes, divided by their sum and times `scale`. Of equals, the
    lower index comes first.
    """
    settings = {"groups": groups, "kept_groups": kept_groups, "experts_per_row": experts_per_row, "scale": scale}
    plain = functools.partial(choose_by_ranks, **settings)
    if is_hopper() and can_count(logits_ME.shape[1], groups):
        return differentiated_as(plain)(functools.partial(choose_by_counting, **settings))(logits_ME, bias)
    return plain(logits_ME, bias)


def can_count(experts: int, groups: int) -> bool:
    """Whether the kernel takes these numbers: chunks of 64 experts, filled up by groups of 8, 16 or 32.

    With groups of 64 Mosaic's search for layouts (jax 0.11) finds none.
    """
    return experts <= MAX_EXPERTS and experts % ROWS == 0 and experts / groups in (8, 16, 32)


def choose_by_ranks(logits_ME, bias, *, groups: int, kept_groups: int, experts_per_row: int, scale: float) -> Choice:
    """`choose_experts` by comparing all pairs."""
    M, E = logits_ME.shape
    scores_ME = jax.nn.sigmoid(logits_ME)
    biased_ME = scores_ME + (bias[None] if bias.ndim == 1 else bias[:M])
    biased_MGN = biased_ME.reshape(M, groups, E // groups)
    kept_MG = ranks(largest_pair_sum(biased_MGN)) < kept_groups
    reachable_ME = jnp.where(kept_MG[:, :, None], biased_MGN, -jnp.inf).reshape(M, E)
    chosen_ME = jnp.where(ranks(reachable_ME) < experts_per_row, scores_ME, 0)
    return choice_of(chosen_ME / (chosen_ME.sum(-1, keepdims=True) + 1e-20) * scale)


def choice_of(weights_ME: jax.Array) -> Choice:
    """The choice that rows with these weights have made."""
    M, E = weights_ME.shape
    columns_EM = jnp.pad(weights_ME.T, ((0, 0), (0, filled_up(M) - M)))
    return Choice(weights_ME, columns_EM, jnp.zeros(E, jnp.int32))


@kernel("groups", "kept_groups", "experts_per_row", "scale")
def choose_by_counting(
    logits_ME,
    bias,
    *,
    groups: int,
    kept_groups: int,
    experts_per_row: int,
    scale: float,
    interpret=False,
    overlap=False,
) -> Choice:
    """`choose_experts` in one kernel: a block of threads per row compares all pairs of experts.

    One warpgroup finds the groups that are kept. Each of the others scores a chunk of 64 experts, compares them, its
    rows, with each other meanwhile, and after that with the experts of the kept groups outside, its columns, counting
    who is ahead.
    """
    M, E = logits_ME.shape
    columns = filled_up(M)  # as many blocks of threads, of which those past the last row have nothing but zeros
    N, together, chunks = E // groups, ROWS * groups // E, E // ROWS  # a chunk is `together` groups of N experts
    padded = groups + -groups % 8  # as many columns as the layout wants
    layout = plgpu.Layout.WGMMA
    by_row, by_column = layout.reduce(1), layout.reduce(0)

    def load(ref, spread):
        return plgpu.load(ref, layout=spread, optimized=False)

    def iota(columns, axis):
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), axis, layout=layout)

    def over_columns(value_C, columns=N):
        return lax.broadcast_in_dim(value_C, (ROWS, columns), [0])

    def over_rows(value_N):
        return lax.broadcast_in_dim(value_N, (ROWS, *value_N.shape), [1])

    def ones(truths):
        return jnp.where(truths, 1.0, 0.0)

    def ahead(own_C, other_N, first=0):
        """1 where a column's value comes before the row's, else 0; the columns' indices begin with `first`."""
        columns = len(other_N)
        own_CN, other_CN = over_columns(own_C, columns), over_rows(other_N)
        lower_CN = ones(iota(columns, 1) + first < iota(columns, 0))
        more_CN = ones(other_CN > own_CN)
        return more_CN + (ones(other_CN >= own_CN) - more_CN) * lower_CN

    def keep_groups(biased_s, pairs_s, kept_s):
        biased_GN = load(biased_s, layout)  # what stands past the last group is of no consequence
        best_G = jnp.max(biased_GN, axis=1)
        is_best_GN = biased_GN == over_columns(best_G)
        second_G = jnp.max(jnp.where(is_best_GN, -jnp.inf, biased_GN), axis=1)
        pair_G = best_G + jnp.where(jnp.sum(ones(is_best_GN), axis=1) > 1, best_G, second_G)
        pairs_s[...] = pair_G
        plgpu.commit_smem()
        ahead_GG = ahead(pair_G, load(pairs_s.at[pl.ds(0, padded)], by_column))
        rank_G = jnp.sum(jnp.where(iota(padded, 1) < groups, ahead_GG, 0.0), axis=1)
        kept_s[...] = ones(rank_G < kept_groups)

    def body(
        logits, bias, weights, weight_columns, zeros,
        biased_s, pairs_s, kept_s, chosen_s, totals_s, scored, kept, chosen,
    ):  # fmt: skip
        block, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
        row = jnp.minimum(block, M - 1)
        own = pl.ds(warpgroup * ROWS, ROWS)

        def biased(group):
            return load(biased_s.at[group], by_column)

        def weigh():
            """The row's weights in the chunk."""
            first = warpgroup * together
            at_C = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row)
            bias_C = load((bias.at[row] if len(bias.shape) == 2 else bias).at[own], by_row)
            wait_for_earlier(overlap)
            start_next(overlap)
            score_C = 1 / (1 + jnp.exp(-load(logits.at[row, own], by_row)))
            own_C = score_C + bias_C
            scatter(biased_s, (first + lax.div(at_C, N), lax.rem(at_C, N)), own_C, by_row)
            plgpu.barrier_arrive(scored)
            plgpu.barrier_wait(scored)
            own_CN = over_columns(own_C)
            # Summed here already, the comparisons can't be put off until the groups are known.
            inside = [jnp.sum(ahead(own_C, biased(first + at), at * N), axis=1) for at in range(together)]
            plgpu.barrier_wait(kept)
            ahead_C, is_kept_C = 0.0, 0.0
            for number, inside_C in enumerate(inside):
                is_kept = kept_s[first + number]
                ahead_C += inside_C * is_kept
                is_kept_C += jnp.where(lax.div(at_C, N) == number, is_kept, 0.0)

            def outside(is_ahead):
                def compare(group, ahead_CN):
                    return ahead_CN + ones(is_ahead(over_rows(biased(group)), own_CN))

                return lambda group, ahead_CN: lax.cond(
                    kept_s[group] > 0, functools.partial(compare, group), lambda same: same, ahead_CN
                )

            ahead_CN = plgpu.layout_cast(jnp.zeros((ROWS, N), jnp.float32), layout)
            ahead_CN = lax.fori_loop(0, first, outside(jnp.greater_equal), ahead_CN)
            ahead_CN = lax.fori_loop(first + together, groups, outside(jnp.greater), ahead_CN)
            ahead_C += jnp.sum(ahead_CN, axis=1)
            is_chosen_C = (ahead_C < experts_per_row) & (is_kept_C > 0)
            chosen_C = jnp.where(is_chosen_C, score_C, 0.0)
            chosen_s[own] = chosen_C
            plgpu.commit_smem()
            totals_s[warpgroup] = jnp.sum(over_rows(load(chosen_s.at[own], by_column)), axis=1)
            plgpu.barrier_arrive(chosen)
            plgpu.barrier_wait(chosen)
            total = sum(totals_s[chunk, 0] for chunk in range(chunks))
            return chosen_C / (total + 1e-20) * scale

        @pl.when(warpgroup == chunks)
        def _groups():
            plgpu.barrier_wait(scored)
            keep_groups(biased_s, pairs_s, kept_s)
            plgpu.barrier_arrive(kept)

        @pl.when(warpgroup < chunks)
        def _experts():
            weights_C = weigh() * jnp.where(block < M, 1.0, 0.0)
            weight_columns.at[own, block][...] = weights_C

            @pl.when(block < M)
            def _write():
                weights[row, own] = weights_C

            @pl.when(block == 0)
            def _clear():
                zeros[own] = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.int32), by_row)

    out = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((M, E), jnp.float32),
            jax.ShapeDtypeStruct((E, columns), jnp.float32),
            jax.ShapeDtypeStruct((E,), jnp.int32),
        ],
        grid=(columns,),
        grid_names=("row",),
        num_threads=chunks + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((ROWS, N), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((E,), jnp.float32),
            plgpu.SMEM((chunks, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=chunks),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=chunks),
        ],
        # Every place is written once, and read after a commit or a barrier, so none is needed around each store.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(logits_ME, bias)
    return Choice(*out)
