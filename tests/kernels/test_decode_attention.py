import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.attention import masked_attention
from dmax_jax.kernels.decode_attention import (
    can_fuse,
    decode_attention,
    fused_decode_attention,
    parts_that_fit,
    plain_decode_attention,
)
from dmax_jax.kernels.layers import rms_norm, rotary_angles, rotate
from tests.kernels.interpreter import interpreted, needs_interpreter

PREVIOUS = jnp.array([True, False, True])
EPS = 1e-6


def random(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def expected(q, own, cached, seen, block_length):
    """One row of the batch at a time, over just the keys that it has."""
    out = []
    for row, sees_previous in enumerate(PREVIOUS.tolist()):
        count, T = int(seen[row]), q.shape[1]
        block = np.arange(T) // block_length
        new = (block[:, None] == block[None]) | ((block[:, None] > block[None]) & sees_previous)
        mask = jnp.asarray(np.concatenate([np.ones((T, count), bool), new], axis=1)[None])
        pairs = zip(cached, own, strict=True)
        keys, values = (jnp.concatenate([old[row, :count], fresh[row]])[None] for old, fresh in pairs)
        out.append(masked_attention(q[row : row + 1], keys, values, mask))
    return jnp.concatenate(out)


@pytest.mark.parametrize(("T", "block_length"), [(4, 4), (8, 4), (9, 3)])
def test_a_position_sees_what_is_cached_and_new_blocks_up_to_its_own(T, block_length):
    rng = np.random.default_rng(T)
    N, K, H = 4, 2, 8
    qkv, norms = random(rng, 3, T, N + 2 * K, H), [random(rng, H) for _ in range(2)]
    cached, seen = [random(rng, 3, 20, K, H) for _ in range(2)], jnp.array([0, 13, 20])
    angles = rotary_angles(jnp.arange(3 * T).reshape(3, T), 4, 100.0)
    arguments = qkv, norms, angles, cached, seen, PREVIOUS
    out, new_k = decode_attention(*arguments, block_length=block_length, eps=EPS)
    q, k = (
        rotate(rms_norm(x, norm, EPS), *angles)
        for x, norm in zip(jnp.split(qkv, (N, N + K), axis=2)[:2], norms, strict=True)
    )
    np.testing.assert_allclose(new_k, k, rtol=0, atol=1e-6)
    own = k, qkv[:, :, N + K :]
    np.testing.assert_allclose(out, expected(q, own, cached, seen, block_length), rtol=0, atol=1e-5)


@needs_interpreter
@pytest.mark.parametrize(
    ("T", "block_length", "N", "K", "R", "seen", "parts"),
    [
        (32, 32, 4, 2, 32, [0, 99, 192], 2),
        (64, 32, 2, 1, 32, [0, 67, 128], 4),  # fewer tiles than blocks of threads
        (16, 8, 8, 2, 32, [0, 35, 64], 2),  # as many, with the new keys'
        (8, 8, 8, 1, 64, [1, 448, 449], 8),  # one fewer, as many, one more
        (64, 32, 1, 1, 32, [256, 300, 448], 1),  # more tiles than the ring has room for
        (64, 16, 1, 1, 64, [640, 64, 577], 2),
    ],
)
def test_the_kernel_equals_the_plain_functions(T, block_length, N, K, R, seen, parts):
    rng = np.random.default_rng(T)
    H, S, bfloat16 = 128, 64 * math.ceil(max(seen) / 64), jnp.bfloat16
    qkv = random(rng, 3, T, N + 2 * K, H, dtype=bfloat16)
    norms = [(1 + 0.1 * random(rng, H)).astype(bfloat16) for _ in range(2)]
    cached = [random(rng, 3, S, K, H, dtype=bfloat16) for _ in range(2)]
    angles = rotary_angles(jnp.arange(3 * T).reshape(3, T) + 5, 2 * R, 10000.0)
    seen = jnp.array(seen)
    arguments = qkv, norms, angles, cached, seen, PREVIOUS
    how = {"block_length": block_length, "eps": EPS}
    found, found_k = interpreted(fused_decode_attention, *arguments, **how, parts=parts)
    wide, wide_norms, wide_cached = jax.tree.map(lambda x: x.astype(jnp.float32), (qkv, norms, cached))
    arguments = wide, wide_norms, angles, wide_cached, seen, PREVIOUS
    exact, k = plain_decode_attention(*arguments, **how)
    assert found.dtype == found_k.dtype == bfloat16
    for row in range(3):
        assert np.linalg.norm(found_k[row] - k[row]) < 0.004 * np.linalg.norm(k[row])
        assert np.linalg.norm(found[row] - exact[row]) < 0.006 * np.linalg.norm(exact[row])


def test_clusters_are_as_large_as_the_machine_has_room_for(monkeypatch):
    monkeypatch.setattr("dmax_jax.kernels.decode_attention.multiprocessors", lambda: 132)
    assert [parts_that_fit(clusters) for clusters in (8, 12, 16, 32, 64, 67, 1000)] == [8, 8, 4, 2, 2, 1, 1]


def test_shapes_that_the_kernel_is_not_made_for(monkeypatch):
    monkeypatch.setattr("dmax_jax.kernels.decode_attention.is_hopper", lambda: True)

    def fits(T=32, heads=24, K=4, H=128, R=32, S=64, rows=1, dtype=jnp.bfloat16):
        angles = (jnp.zeros((rows, T, R)),) * 2
        return can_fuse(jnp.zeros((1, T, heads, H), dtype), angles, (jnp.zeros((1, S, K, H), dtype),) * 2)

    assert fits()
    assert fits(T=64)
    changes = ({"T": 96}, {"T": 20}, {"H": 64}, {"R": 16}, {"rows": 2}, {"S": 96}, {"dtype": jnp.float32}, {"T": 8})
    assert not any(fits(**change) for change in changes)
    monkeypatch.undo()
    assert not fits()  # no GPU
