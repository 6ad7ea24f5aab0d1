import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.attention import masked_attention
from dmax_jax.kernels.block_decode import decode_attention, decode_in_tiles, decode_masked
from tests.kernels.test_streamed_experts import interpreter, needs_interpreter

# new positions T, block length, query heads, key heads, cached positions
SIZES = [(32, 32, 4, 2, 192), (64, 32, 4, 2, 128), (16, 8, 8, 2, 128), (128, 64, 2, 1, 64)]
PREVIOUS = [True, False, True]


def draw(T, N, K, S, H, dtype):
    rng = np.random.default_rng(T)
    shapes = [(3, T, N, H), (3, T, K, H), (3, T, K, H), (3, S, K, H), (3, S, K, H)]
    q, k, v, cached_k, cached_v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q, (k, v), (cached_k, cached_v), jnp.array([0, S // 2 + 3, S], jnp.int32), jnp.array(PREVIOUS)


def expected(q, own, cached, seen, block_length):
    """One row of the batch at a time, over just the keys that it has."""
    out = []
    for row, sees_previous in enumerate(PREVIOUS):
        count, T = int(seen[row]), q.shape[1]
        block = np.arange(T) // block_length
        new = (block[:, None] == block[None]) | ((block[:, None] > block[None]) & sees_previous)
        mask = jnp.asarray(np.concatenate([np.ones((T, count), bool), new], axis=1)[None])
        keys, values = (jnp.concatenate([old[row : row + 1, :count], fresh[row : row + 1]], axis=1)
                        for old, fresh in zip(cached, own, strict=True))  # fmt: skip
        out.append(masked_attention(q[row : row + 1], keys, values, mask))
    return jnp.concatenate(out)


@pytest.mark.parametrize(("T", "block_length", "N", "K", "S"), SIZES)
def test_a_position_sees_what_is_cached_and_new_blocks_up_to_its_own(T, block_length, N, K, S):
    q, own, cached, seen, previous = draw(T, N, K, S, 8, jnp.float32)
    found = decode_masked(q, own, cached, seen, previous, block_length=block_length)
    np.testing.assert_allclose(found, expected(q, own, cached, seen, block_length), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        found, decode_attention(q, own, cached, seen, previous, block_length=block_length)
    )  # a CPU has no other way


@needs_interpreter
@pytest.mark.parametrize(("T", "block_length", "N", "K", "S"), SIZES)
def test_the_kernel_equals_the_plain_function(T, block_length, N, K, S):
    q, own, cached, seen, previous = draw(T, N, K, S, 128, jnp.bfloat16)
    found = decode_in_tiles(q, own, cached, seen, previous, block_length=block_length, interpret=interpreter())
    assert found.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (q, own, cached))
    exact = decode_masked(*wide, seen, previous, block_length=block_length)
    assert np.linalg.norm(found - exact) < 0.004 * np.linalg.norm(exact)
