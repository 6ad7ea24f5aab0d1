import jax.numpy as jnp
import pytest

from dmax_jax.model.promotion import promoted_anywhere, promoted_prefix


@pytest.mark.parametrize(
    ("masked", "confidence", "promoted"),
    [
        ("mmmm", [0.9, 0.8, 0.9, 0.6], "++++"),
        ("mmmm", [0.9, 0.4, 0.9, 0.6], "+..."),  # nothing right of an unsure position
        ("mmmm", [0.4, 0.9, 0.9, 0.9], "+..."),  # at least the left-most
        ("tmtm", [0.1, 0.4, 0.1, 0.9], ".+.."),  # the left-most of the masked ones
        ("mtmm", [0.9, 0.1, 0.9, 0.4], "+.+."),  # a decoded position does not break the prefix
        ("mmtm", [0.9, 0.5, 0.1, 0.5], "++.+"),  # the threshold itself is enough
        ("tttt", [0.9, 0.1, 0.9, 0.9], "...."),
    ],
)
def test_promoted_prefix(masked, confidence, promoted):
    found = promoted_prefix(jnp.array([[c == "m" for c in masked]]), jnp.array([confidence]), 0.5)
    assert found.tolist() == [[c == "+" for c in promoted]]


@pytest.mark.parametrize(
    ("masked", "confidence", "promoted"),
    [
        ("mmmm", [0.9, 0.4, 0.9, 0.6], "+.++"),  # an unsure position stops nothing
        ("mmmm", [0.1, 0.4, 0.2, 0.4], ".+.."),  # at least the first best
        ("tmtm", [0.9, 0.3, 0.9, 0.4], "...+"),  # the best of the masked ones
        ("mmtm", [0.9, 0.5, 0.9, 0.4], "++.."),  # the threshold itself is enough
        ("tttt", [0.9, 0.9, 0.9, 0.9], "...."),
    ],
)
def test_promoted_anywhere(masked, confidence, promoted):
    found = promoted_anywhere(jnp.array([[c == "m" for c in masked]]), jnp.array([confidence]), 0.5)
    assert found.tolist() == [[c == "+" for c in promoted]]
