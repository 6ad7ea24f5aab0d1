import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.attention import block_attention, masked_attention

B, N, K, H = 3, 4, 2, 8


def training_visibility(query: int, key: int, length: int, block_length: int) -> bool:
    """The rule of the paper's training mask for positions of `[noisy | clean]`."""
    query_clean, key_clean = query >= length, key >= length
    query_block, key_block = query % length // block_length, key % length // block_length
    if not query_clean and not key_clean:
        return query_block == key_block
    if not query_clean and key_clean:
        return key_block < query_block
    return key_clean and key_block <= query_block  # clean never sees noisy


def two_stream_mask(length: int, block_length: int) -> jax.Array:
    span = range(2 * length)
    return jnp.array([[[training_visibility(query, key, length, block_length) for key in span] for query in span]])


def inputs(length: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values of two streams, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, (B, 2 * length, n, H)) for key, n in zip(keys, (N, K, K, N), strict=True))


def two_streams(q, k, v, *, block_length, runs):
    """The pattern of training by `block_attention`: the clean stream over itself, the noisy one over both."""
    (noisy_q, clean_q), (noisy_k, clean_k), (noisy_v, clean_v) = (jnp.split(x, 2, axis=1) for x in (q, k, v))
    attend = functools.partial(block_attention, block_length=block_length, runs=runs)
    clean = (clean_k, clean_v)
    return jnp.concatenate([attend(noisy_q, (noisy_k, noisy_v), clean), attend(clean_q, clean, clean)], axis=1)


@pytest.mark.parametrize(("blocks", "block_length", "runs"), [(1, 4, 3), (5, 3, 1), (5, 3, 2), (5, 3, 8), (6, 2, 3)])
def test_blocks_equal_the_masked_attention_in_values_and_gradients(blocks, block_length, runs):
    length = blocks * block_length
    q, k, v, cotangent = inputs(length)
    dense = functools.partial(masked_attention, mask_BTS=two_stream_mask(length, block_length))
    split = functools.partial(two_streams, block_length=block_length, runs=runs)

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(attention):
        out, pull_back = jax.vjp(attention, q, k, v)
        return out, *pull_back(cotangent)

    for found, wanted in zip(both_ways(split), both_ways(dense), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_blocks_survive_large_scores():
    q, k, v, _ = inputs(12)
    out = two_streams(100 * q, 100 * k, v, block_length=4, runs=3)
    expected = masked_attention(100 * q, 100 * k, v, two_stream_mask(12, 4))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_a_query_that_sees_nothing_is_harmless():
    q, k, v, _ = inputs(2)
    assert np.isfinite(masked_attention(q, k, v, jnp.zeros((1, 4, 4), bool))).all()
