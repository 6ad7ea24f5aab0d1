import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.model.soft_embedding import soft_embedding

soft = jax.jit(soft_embedding)


def mix(token, mask, confidence):
    """The embedding of one position."""
    return np.asarray(soft(jnp.array([[token]]), jnp.array(mask), jnp.array([[confidence]])))[0, 0]


@pytest.mark.parametrize(("confidence", "expected"), [(1.0, [3.0, 0.0]), (0.0, [0.0, 5.0])])
def test_full_confidence_is_the_token_and_none_is_the_mask(confidence, expected):
    np.testing.assert_allclose(mix([3.0, 0.0], [0.0, 5.0], confidence), expected, rtol=1e-6)


def test_a_mix_by_hand():
    # (1.2, 2.4) has the direction of the mix, 0.4 * 3 + 0.6 * 4 = 3.6 is its length (Eq. 9, 10)
    found = mix([3.0, 0.0], [0.0, 4.0], 0.4)
    np.testing.assert_allclose(found, 3.6 * np.array([1.2, 2.4]) / np.hypot(1.2, 2.4), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_direction_and_length(dtype):
    rng = np.random.default_rng(0)
    token = jnp.asarray(rng.normal(size=(2, 5, 16)), dtype)
    mask = jnp.asarray(3 * rng.normal(size=16), dtype)
    confidence = rng.uniform(size=(2, 5)).astype(np.float32)
    found = np.asarray(soft(token, mask, confidence))
    assert found.dtype == np.float32  # whatever comes in
    token, mask, p = np.asarray(token, np.float64), np.asarray(mask, np.float64), confidence[:, :, None]
    straight = p * token + (1 - p) * mask
    length = p[:, :, 0] * np.linalg.norm(token, axis=-1) + (1 - p[:, :, 0]) * np.linalg.norm(mask)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), length, rtol=1e-5)
    cosine = (found * straight).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(straight, axis=-1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-6)


def test_opposite_embeddings_that_cancel_give_zero_and_no_nan():
    np.testing.assert_array_equal(mix([1.0, -2.0], [-1.0, 2.0], 0.5), [0.0, 0.0])
