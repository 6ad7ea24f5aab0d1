import numpy as np
import pytest

from dmax_jax.model.masks import block_causal_mask, two_stream_mask

SIZES = [(1, 1), (6, 1), (8, 4), (12, 3), (10, 4), (5, 8)]


@pytest.mark.parametrize(("length", "block_length"), SIZES)
def test_a_position_sees_its_own_and_earlier_blocks(length, block_length):
    expected = [[s // block_length <= t // block_length for s in range(length)] for t in range(length)]
    np.testing.assert_array_equal(block_causal_mask(length, block_length)[0], expected)


def training_visibility(query: int, key: int, length: int, block_length: int) -> bool:
    """The rule of the paper's training mask for positions of `[noisy | clean]`."""
    query_clean, key_clean = query >= length, key >= length
    query_block, key_block = query % length // block_length, key % length // block_length
    if not query_clean and not key_clean:
        return query_block == key_block
    if not query_clean and key_clean:
        return key_block < query_block
    return key_clean and key_block <= query_block  # clean never sees noisy


@pytest.mark.parametrize(("length", "block_length"), SIZES)
def test_the_training_mask_is_block_diagonal_offset_and_block_causal(length, block_length):
    span = range(2 * length)
    expected = [[training_visibility(query, key, length, block_length) for key in span] for query in span]
    np.testing.assert_array_equal(two_stream_mask(length, block_length)[0], expected)
