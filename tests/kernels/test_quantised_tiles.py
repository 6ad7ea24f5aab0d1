from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels import quantised_tiles
from dmax_jax.kernels.quantised_weight import KINDS

PAIRS = np.arange(2**16, dtype="<u4")


def prmt(low, high, selector):
    """The instruction: four of the bytes of two words, or the highest bit of one eight times."""
    bytes_ = np.stack([low, high], axis=1).view("u1")
    digits = [int(selector[0]) >> shift & 15 for shift in (0, 4, 8, 12)]
    chosen = [bytes_[:, digit % 8].astype("i1") >> (7 if digit >= 8 else 0) for digit in digits]
    return np.stack(chosen, axis=1).view("<u4")[:, 0]


def in_float32(operation):
    return lambda *pairs: operation(*(pair.astype(np.float32) for pair in pairs)).astype(jnp.bfloat16)


def constant(value, dtype):
    return np.full(len(PAIRS), value, dtype)


@pytest.fixture
def on_numpy(monkeypatch):
    """What the kernels' inline code does to registers, done to arrays."""
    types = {
        "BF16Type": SimpleNamespace(get=lambda: np.dtype(jnp.bfloat16)),
        "VectorType": SimpleNamespace(get=lambda shape, dtype: dtype),
    }
    operations = {"subf": in_float32(np.subtract), "mulf": in_float32(np.multiply)}
    operations |= {"andi": np.bitwise_and, "shli": np.left_shift}
    utils = SimpleNamespace(prmt=prmt, bitcast=lambda array, dtype: array.view(dtype))
    monkeypatch.setattr(quantised_tiles, "word_type", lambda: np.dtype("<u4"))
    monkeypatch.setattr(quantised_tiles, "ir", SimpleNamespace(**types))
    monkeypatch.setattr(quantised_tiles, "arith", SimpleNamespace(**operations))
    monkeypatch.setattr(quantised_tiles, "mgpu", SimpleNamespace(c=constant, utils=utils))


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_of_values_become_the_same_in_bfloat16(kind, on_numpy):
    convert = {"int8": quantised_tiles.int8_to_bfloat16, "fp8": quantised_tiles.fp8_to_bfloat16}[kind]
    values = PAIRS.astype("<u2").view(KINDS[kind]).astype(np.float32)
    found = convert(PAIRS).astype(np.float32)
    finite = np.isfinite(values)
    assert np.unique(values[finite]).size == {"int8": 256, "fp8": 253}[kind]  # one 0 for two
    np.testing.assert_array_equal(found[finite], values[finite])
