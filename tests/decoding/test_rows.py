"""Blocks entered and left, driven by logits that are given step by step instead of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.decoding.block import enter_block
from dmax_jax.decoding.generate import decode_step
from dmax_jax.decoding.policies import SpdPolicy, ThresholdPolicy
from dmax_jax.decoding.rows import Rows, empty_trace, slice_rows
from tests.decoding.blocks import EOS, MASK, make_logits

WIDTH, TOTAL = 4, 12
SURE = [0.95] * WIDTH
QUICK = ThresholdPolicy(threshold=0.9)


def make_rows(*prompts: list[int], end: int = TOTAL, start: int = 0) -> Rows:
    """Rows whose first `start` positions are finished, before any forward."""
    B = len(prompts)
    tokens_BT = np.full((B, TOTAL), MASK, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    start_B = np.full(B, start, np.int32)
    return Rows(
        tokens_BT=tokens_BT,
        block=jax.tree.map(np.asarray, enter_block(tokens_BT[:, start : start + WIDTH], MASK)),
        start_B=start_B,
        end_B=np.full(B, end, np.int32),
        forwards_B=np.zeros(B, np.int32),
        cache=(),
        trace=empty_trace(B, TOTAL, WIDTH),
    )


@jax.jit
def forward(rows: Rows, logits_BWV, policy, keys_B) -> Rows:
    return decode_step(rows, logits_BWV, keys_B, policy, MASK, EOS)


def decode(rows: Rows, *steps: list[tuple[list[int], list[float]]], policy=QUICK) -> Rows:
    """Each step gives every row its predictions and confidences."""
    keys_B = jax.random.split(jax.random.key(0), rows.start_B.shape[0])
    for step in steps:
        rows = forward(rows, np.concatenate([make_logits(*row) for row in step]), policy, keys_B)
    return rows


def tokens_of(rows: Rows) -> list[list[int]]:
    return rows.tokens_BT.tolist()


M4 = [MASK] * 4


def test_a_block_that_stops_is_written_and_the_next_one_entered():
    rows = decode(make_rows([1, 2]), [([9, 9, 3, 4], SURE)])
    assert tokens_of(rows) == [[1, 2, 3, 4, *M4, *M4]]  # the prompt's tail stays
    assert (rows.start_B.tolist(), rows.forwards_B.tolist()) == ([4], [1])
    assert (rows.uncached_B.tolist(), rows.done_B.tolist()) == ([True], [False])
    fresh = enter_block(jnp.array([M4]), MASK)
    jax.tree.map(np.testing.assert_array_equal, rows.block, fresh)


def test_a_block_that_goes_on_is_not_written_yet():
    rows = decode(make_rows([1, 2]), [([9, 9, 3, 4], [0.95, 0.95, 0.95, 0.5])])
    assert tokens_of(rows) == [[1, 2, MASK, MASK, *M4, *M4]]
    assert rows.block.tokens_BW.tolist() == [[1, 2, 3, MASK]]
    assert (rows.start_B.tolist(), rows.forwards_B.tolist(), rows.block.step_B.tolist()) == ([0], [1], [1])
    rows = decode(rows, [([9, 9, 7, 5], [0.95, 0.95, 0.95, 0.4])])
    assert tokens_of(rows) == [[1, 2, 3, 5, *M4, *M4]]
    assert (rows.start_B.tolist(), rows.forwards_B.tolist(), rows.uncached_B.tolist()) == ([4], [2], [True])


def test_the_previous_block_is_committed_once_and_the_prompt_not_again():
    assert make_rows([1, 2, 3, 4, 5], start=4).uncached_B.tolist() == [False]
    rows = decode(make_rows([1, 2]), [([9, 9, 3, 4], SURE)], [([5, 6, 7, 8], [0.95, 0.5, 0.5, 0.5])])
    assert rows.uncached_B.tolist() == [False]


def test_a_block_is_left_after_as_many_forwards_as_it_has_positions():
    policy = SpdPolicy(threshold=0.0, accept_threshold=1.0)
    restless = [[([step, step, step, step], [0.5] * 4)] for step in range(1, 5)]
    rows = decode(make_rows([]), *restless[:3], policy=policy)
    assert rows.start_B.tolist() == [0]
    rows = decode(rows, restless[3], policy=policy)
    assert tokens_of(rows) == [[4, 4, 4, 4, *M4, *M4]]
    assert (rows.start_B.tolist(), rows.forwards_B.tolist()) == ([4], [4])
    assert rows.trace.stop_BF[0, :4].tolist() == [False] * 4  # it ran out of forwards, not by its own rule


def test_the_last_block_ends_a_row():
    rows = decode(make_rows([1, 2], end=8), [([9, 9, 3, 4], SURE)], [([5, 6, 7, 8], SURE)])
    assert rows.done_B.tolist() == [True]
    assert tokens_of(rows) == [[1, 2, 3, 4, 5, 6, 7, 8, *M4]]
    assert rows.uncached_B.tolist() == [False]


def test_eos_fills_everything_after_its_block_and_ends_the_row():
    rows = decode(make_rows([1]), [([9, 3, EOS, 4], SURE)])
    assert tokens_of(rows) == [[1, 3, EOS, 4] + [EOS] * 8]
    assert (rows.done_B.tolist(), rows.forwards_B.tolist()) == ([True], [1])


def test_eos_in_a_prompt_does_not_end_generation():
    rows = decode(make_rows([1, EOS]), [([9, 9, 3, 4], SURE)])
    assert rows.done_B.tolist() == [False]
    assert tokens_of(rows) == [[1, EOS, 3, 4, *M4, *M4]]


def test_an_eos_that_is_predicted_away_before_its_block_is_left_does_not_end_generation():
    policy = SpdPolicy(threshold=0.0, accept_threshold=0.9)
    rows = decode(make_rows([]), [([1, EOS, 3, 4], [0.5] * 4)], [([1, 2, 3, 4], SURE)], policy=policy)
    assert rows.done_B.tolist() == [False]
    assert tokens_of(rows) == [[1, 2, 3, 4, *M4, *M4]]


def test_a_finished_row_is_frozen_while_its_neighbours_go_on():
    rows = decode(make_rows([1], [2], [3]), [([9, 5, EOS, 6], SURE), ([9, 4, 4, 4], SURE), ([9, 5, EOS, 6], SURE)])
    after = decode(rows, [([7, 7, 7, 7], SURE)] * 3, [([8, 8, 8, 8], SURE)] * 3)
    assert rows.done_B.tolist() == [True, False, True]
    assert after.done_B.tolist() == [True, True, True]
    for row in (0, 2):
        jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[row], new[row]), rows, after)  # noqa: B023
    assert tokens_of(after)[1] == [2, 4, 4, 4, 7, 7, 7, 7, 8, 8, 8, 8]
    assert after.forwards_B.tolist() == [1, 3, 1]


def test_rows_leave_blocks_at_their_own_time():
    late = [0.95, 0.95, 0.95, 0.5]
    rows = decode(
        make_rows([1], [1]),
        [([9, 2, 3, 4], SURE), ([9, 2, 3, 4], late)],
        [([5, 6, 7, 8], SURE), ([9, 9, 9, 9], SURE)],
    )
    assert tokens_of(rows) == [[1, 2, 3, 4, 5, 6, 7, 8, *M4], [1, 2, 3, 9, *M4, *M4]]
    assert rows.start_B.tolist() == [8, 4]


def test_the_trace_has_every_block_after_every_forward():
    late = [0.95, 0.95, 0.95, 0.5]
    rows = decode(make_rows([1]), [([9, 2, 3, 4], late)], [([9, 9, 9, 5], SURE)], [([6, 6, EOS, 6], SURE)])
    rows = decode(rows, [([7, 7, 7, 7], SURE)])  # the row is done
    assert rows.forwards_B.tolist() == [3]
    assert rows.trace.block_BF[0, :3].tolist() == [0, 0, 1]
    assert rows.trace.tokens_BFW[0, :3].tolist() == [[1, 2, 3, MASK], [1, 2, 3, 5], [6, 6, EOS, 6]]
    assert rows.trace.stop_BF[0, :3].tolist() == [False, True, True]
    assert not rows.trace.tokens_BFW[0, 3:].any()


@pytest.mark.parametrize("fill", [True, False])
def test_masks_that_are_left_over_get_the_best_other_token(fill):
    policy = ThresholdPolicy(threshold=0.9, fill_leftover_masks=fill)
    logits = make_logits([9, 2, MASK, MASK], SURE)
    logits[0, 2, 6], logits[0, 3, EOS] = -2.5, -2.5  # the runners-up
    keys = jax.random.split(jax.random.key(0), 1)
    rows = forward(make_rows([1]), logits, policy, keys)
    assert rows.start_B.tolist() == [0]  # the first forward committed something
    rows = forward(rows, logits, policy, keys)
    left = [6, EOS] if fill else [MASK, MASK]
    assert tokens_of(rows) == [[1, 2, *left, *([EOS] * 8 if fill else M4 + M4)]]
    assert rows.done_B.tolist() == [fill]


def test_masks_are_filled_only_in_blocks_that_are_left():
    """The second row's block has had one more position to commit."""
    logits = np.concatenate([make_logits([9, 2, 3, MASK], SURE), make_logits([9, 2, 3, 4], [0.95, 0.95, 0.5, 0.5])])
    keys_B = jax.random.split(jax.random.key(0), 2)
    rows = forward(make_rows([1], [1]), logits, QUICK, keys_B)
    assert rows.block.tokens_BW.tolist() == [[1, 2, 3, MASK], [1, 2, MASK, MASK]]
    rows = forward(rows, np.concatenate([make_logits([9, 2, 3, MASK], SURE)] * 2), QUICK, keys_B)
    assert rows.start_B.tolist() == [4, 0]
    assert tokens_of(rows)[0][:4] == [1, 2, 3, 0]  # of equals the lowest
    assert rows.block.tokens_BW[1].tolist() == [1, 2, 3, MASK]


def test_slices_start_where_each_row_says():
    tokens_BT = jnp.arange(20).reshape(2, 10)
    assert slice_rows(tokens_BT, jnp.array([1, 6]), 4).tolist() == [[1, 2, 3, 4], [16, 17, 18, 19]]
