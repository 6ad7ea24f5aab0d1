import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dmax_jax.config import MeshConfig
from dmax_jax.decoding.prediction import predict
from dmax_jax.model.shares import AXIS
from dmax_jax.sharding import make_mesh

KEYS = jax.random.split(jax.random.key(1), 2)
KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "many ties": lambda rng, shape: rng.integers(-1, 2, shape),
    "all equal": lambda rng, shape: np.full(shape, -2.5),
    "large": lambda rng, shape: rng.choice([-3e38, -1e5, 1e5, 1e5 + 1, 3e38], shape),
    "rising": lambda rng, shape: np.broadcast_to(np.linspace(-400, 400, shape[-1]), shape),
    "impossible tokens": lambda rng, shape: np.where(rng.random(shape) < 0.6, -np.inf, rng.normal(size=shape)),
    "one possible token": lambda rng, shape: np.where(rng.random(shape).argsort(-1) == 0, 1.0, -np.inf),
}


def reference(logits_BWV, mask_id):
    """By three passes in float64: best tokens, their probability, best tokens but the mask."""
    wide_BWV = logits_BWV.astype(np.float64)
    best_BW = wide_BWV.argmax(-1)
    with np.errstate(over="ignore"):
        weights_BWV = np.exp(wide_BWV - wide_BWV.max(-1, keepdims=True))
    others_BWV = np.where(np.arange(wide_BWV.shape[-1]) == mask_id, -np.inf, wide_BWV)
    return best_BW, 1 / weights_BWV.sum(-1), others_BWV.argmax(-1)


def predict_on(devices, logits_BWV, mask_id):
    run = functools.partial(predict, mask_id=mask_id)
    if devices > 1:
        mesh = make_mesh(MeshConfig(data=1, tensor=devices))
        own, whole = PartitionSpec(None, None, AXIS), PartitionSpec()
        run = jax.shard_map(run, mesh=mesh, in_specs=own, out_specs=whole, check_vma=False)
    return jax.jit(run)(logits_BWV)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("vocabulary", "devices"), [(2, 1), (7, 1), (12, 1), (12, 2), (256, 1), (4099, 1), (4100, 4)]
)  # fmt: skip
def test_one_pass_finds_what_three_would(kind, vocabulary, devices):
    rng = np.random.default_rng(vocabulary)
    for mask_id in {0, vocabulary // 2, vocabulary - 1}:
        logits_BWV = KINDS[kind](rng, (2, 5, vocabulary)).astype(np.float32)
        highest, second = np.maximum(logits_BWV[0, :2].max(-1), 0)
        logits_BWV[0, :2, mask_id] = [highest + 1, second]  # the mask is best, by itself and perhaps among equals
        logits_BWV[0, 2:, mask_id - 1] = 0  # some token is possible
        logits_BWV[1, :, mask_id] = [1, 0, 1, 0, 1]
        tokens_BW, confidence_BW, others_BW = reference(logits_BWV, mask_id)
        found = predict_on(devices, logits_BWV, mask_id)
        np.testing.assert_array_equal(found.tokens_BW, tokens_BW)
        np.testing.assert_array_equal(found.others_BW, others_BW)
        np.testing.assert_allclose(found.confidence_BW, confidence_BW, rtol=1e-6 + vocabulary * 2**-24)
        assert {found.tokens_BW.dtype, found.others_BW.dtype} == {jnp.dtype("int32")}


@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_logit_that_is_no_number_gives_no_number(at):
    logits_BWV = np.zeros((1, 2, 8), np.float32)
    logits_BWV[0, 1, at] = np.nan
    confidence_BW = jax.jit(predict)(logits_BWV, 7).confidence_BW
    assert np.isnan(confidence_BW).tolist() == [[False, True]]


def test_bfloat16_logits_give_float32_confidences():
    logits = jax.random.normal(jax.random.key(0), (1, 4, 50), jnp.bfloat16)
    narrow, wide = (jax.jit(predict)(x, 49).confidence_BW for x in (logits, logits.astype(jnp.float32)))
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_draws_from_the_sharpened_softmax_and_measures_at_temperature_one(temperature):
    scores, draws = np.array([1.0, 0.0, 2.0, -1.0]), 4000
    logits = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (2, draws, 4))
    found = jax.jit(predict, static_argnums=2)(logits, 2, temperature, KEYS)
    tokens = np.asarray(found.tokens_BW)
    sharpened, plain = (np.exp(z) / np.exp(z).sum() for z in (scores / temperature, scores))
    frequency = np.bincount(tokens.ravel(), minlength=4) / (2 * draws)
    assert (np.abs(frequency - sharpened) < 5 * np.sqrt(sharpened * (1 - sharpened) / (2 * draws))).all()
    np.testing.assert_allclose(found.confidence_BW, plain[tokens], rtol=1e-5)
    assert (tokens[0] != tokens[1]).any()  # rows have keys of their own
    assert not found.others_BW.any()  # the best but the mask, whatever is drawn
