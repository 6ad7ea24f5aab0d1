import functools

import jax
import jax.numpy as jnp
import numpy as np

from dmax_jax.kernels import decode_attention as kernels
from dmax_jax.kernels.layers import rotary_angles
from dmax_jax.model.attention import attention
from dmax_jax.model.cache import LayerKV
from dmax_jax.model.masks import CachedBlocks
from dmax_jax.model.params import Attention
from tests.kernels.interpreter import interpreted, needs_interpreter
from tests.models import small_model

B, T, S, D, N, K, H = 2, 64, 64, 32, 4, 2, 128


@needs_interpreter
def test_the_fused_kernel_and_the_plain_functions_are_one_attention(monkeypatch):
    """Output, and the new keys and values that go into the cache."""
    config = small_model(num_attention_heads=N, num_key_value_heads=K, head_dim=H)
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.bfloat16)

    weights = Attention(random((N + 2 * K) * H, D), random(D, N * H), 1 + random(H), 1 + random(H))
    x_BTD = D**0.5 * random(B, T, D)
    norm_D = jnp.ones(D, jnp.bfloat16)
    angles = rotary_angles(jnp.arange(B * T).reshape(B, T), config.rotary_dim, config.rope_theta)
    visible = CachedBlocks(jnp.array([40, 0]), jnp.array([True, False]), 32)
    cached = LayerKV(10 * random(B, S, K, H), 10 * random(B, S, K, H))
    expected = attention(x_BTD / 8, None, norm_D, weights, angles, visible, cached, config)
    kernel = functools.partial(interpreted, kernels.fused_decode_attention)
    monkeypatch.setattr(kernels, "can_fuse", lambda *_: True)
    monkeypatch.setattr(kernels, "fused_decode_attention", kernel)
    found = attention(x_BTD / 8, None, norm_D, weights, angles, visible, cached, config)

    def close(a, b):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)

    jax.tree.map(close, found, expected)
    assert np.linalg.norm(np.asarray(expected[0], np.float32)) > 1
