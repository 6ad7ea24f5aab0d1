import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels import expert_choice
from dmax_jax.kernels.expert_choice import choose_by_counting, choose_by_ranks, choose_experts
from tests.kernels.interpreter import interpreted, needs_interpreter

SETTINGS = {"groups": 4, "kept_groups": 2, "experts_per_row": 5, "scale": 2.5}


def draw(seed: int, rows: int, experts: int):
    """Logits and biases of every row, with many ties."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-4, 5, size=(rows, experts)) / 2
    return [jnp.asarray(array, jnp.float32) for array in (logits, rng.integers(0, 3, logits.shape) / 4)]


def with_groups(groups: int, kept_groups: int, experts_per_row: int) -> dict:
    return {"groups": groups, "kept_groups": kept_groups, "experts_per_row": experts_per_row, "scale": 2.5}


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "experts", "settings"),
    [
        (1, 64, with_groups(8, 4, 4)),
        (3, 64, with_groups(2, 1, 6)),
        (5, 128, SETTINGS),
        (32, 64, with_groups(4, 1, 7)),
        (65, 64, with_groups(4, 3, 4)),
        (5, 256, with_groups(8, 4, 8)),
        (2, 256, with_groups(16, 2, 8)),
        (2, 256, with_groups(32, 5, 8)),
    ],
)
@pytest.mark.parametrize("kind", ["own biases", "one bias", "alike"])
def test_the_kernel_equals_the_plain_function(rows, experts, settings, kind):
    logits, bias = draw(rows, rows, experts)
    if kind == "one bias":
        bias = bias[0]
    elif kind == "alike":  # everything is a tie
        logits, bias = jnp.full_like(logits, 0.5), jnp.full_like(bias[0], -0.25)
    found = interpreted(choose_by_counting, logits, bias, **settings)
    expected = choose_by_ranks(logits, bias, **settings)
    np.testing.assert_allclose(found.weights_ME, expected.weights_ME, rtol=1e-6)
    np.testing.assert_array_equal(found.columns_EM[:, :rows], found.weights_ME.T)
    assert (found.columns_EM[:, rows:] == 0).all()
    assert found.columns_EM.shape == expected.columns_EM.shape
    assert found.zeros_E.tolist() == [0] * experts


@needs_interpreter
def test_a_hopper_gpu_runs_the_kernel_and_differentiates_the_plain_function(monkeypatch):
    inputs = draw(0, 6, 128)
    seen = []

    def stand_in(*arguments, **settings):
        seen.append(settings)
        plain = choose_by_ranks(*arguments, **settings)
        shapes = jax.eval_shape(functools.partial(choose_by_counting, **settings), *arguments)
        assert jax.tree.map(lambda leaf: leaf.shape, plain) == jax.tree.map(lambda leaf: leaf.shape, shapes)
        return plain

    def loss(choose, logits, bias):
        return jnp.sum(choose(logits, bias, **SETTINGS).weights_ME ** 2)

    plain = jax.grad(functools.partial(loss, choose_experts))(*inputs)
    monkeypatch.setattr(expert_choice, "is_hopper", lambda: True)
    monkeypatch.setattr(expert_choice, "choose_by_counting", stand_in)
    np.testing.assert_array_equal(jax.grad(functools.partial(loss, choose_experts))(*inputs), plain)
    assert seen == [SETTINGS]
    assert np.abs(plain).max() > 0
    for experts, groups in ((512, 8), (96, 4), (64, 16), (256, 4)):  # too many, ragged; groups too small, too large
        seen.clear()
        choose_experts(*draw(0, 6, experts), **SETTINGS | {"groups": groups})
        assert not seen
