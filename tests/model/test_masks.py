import numpy as np
import pytest

from dmax_jax.model.masks import block_causal_mask

SIZES = [(1, 1), (6, 1), (8, 4), (12, 3), (10, 4), (5, 8)]


@pytest.mark.parametrize(("length", "block_length"), SIZES)
def test_a_position_sees_its_own_and_earlier_blocks(length, block_length):
    expected = [[s // block_length <= t // block_length for s in range(length)] for t in range(length)]
    np.testing.assert_array_equal(block_causal_mask(length, block_length)[0], expected)
