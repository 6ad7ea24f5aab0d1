import jax.numpy as jnp
import numpy as np

from dmax_jax.kernels.int8 import dequantise, quantise


def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most():
    weight = np.random.default_rng(0).normal(size=(3, 5, 40)) * np.logspace(-3, 3, 5)[:, None]
    rounded = quantise(jnp.asarray(weight))
    assert rounded.values.dtype == jnp.int8
    assert rounded.scale.shape == (3, 5)
    np.testing.assert_array_equal(np.abs(rounded.values).max(-1), 127)
    step = np.abs(weight).max(-1) / 127
    np.testing.assert_allclose(rounded.scale, step, rtol=1e-6)
    assert (np.abs(dequantise(rounded, jnp.float32) - weight) <= 0.5001 * step[..., None]).all()


def test_a_channel_of_zeros_stays_zero():
    rounded = quantise(jnp.zeros((2, 8), jnp.bfloat16))
    assert (rounded.values == 0).all()
    assert (rounded.scale == 1).all()
