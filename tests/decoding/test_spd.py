import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.decoding.block import Block, predict_tokens
from dmax_jax.decoding.policies import STOP_RULES, CreditPolicy, HierarchicalPolicy, SpdPolicy, ThresholdPolicy
from dmax_jax.decoding.spd import spd_step
from dmax_jax.errors import InputError
from tests.conftest import GOLDEN
from tests.decoding.blocks import KEYS, MASK, TABLE, embed, make_block, make_logits
from tests.models import load_arrays

predict = jax.jit(predict_tokens, static_argnums=1)


@jax.jit
def step(block, logits, policy, keys=KEYS):
    return spd_step(block, logits, keys, embed, policy, MASK)


def test_steps_equal_the_official_code():
    golden, arrays = json.loads((GOLDEN / "spd_steps.json").read_text()), load_arrays(GOLDEN / "spd_steps.npz")
    table, logits, after = (arrays[name] for name in ("embedding", "logits", "embeddings_after"))

    @jax.jit
    def golden_step(block, logits_BWV, policy):
        return spd_step(block, logits_BWV, KEYS, lambda t: jnp.asarray(table)[t], policy, golden["mask_id"])

    checked = 0
    for _, steps in itertools.groupby(enumerate(golden["steps"]), key=lambda pair: pair[1]["trial"]):
        embeddings = None
        for index, case in steps:
            tokens, active = np.array([case["before"]], np.int32), np.array([case["active"]])
            embeddings = table[tokens] if embeddings is None else embeddings
            unsure = np.zeros(tokens.shape, np.float32)
            block = Block(tokens, active, embeddings, unsure, np.zeros(1, np.int32), np.zeros(1, bool))
            block = golden_step(block, logits[index][None], SpdPolicy(threshold=case["threshold"]))
            assert block.tokens_BW[0].tolist() == case["after"], case
            assert bool(block.stopped_B[0]) == case["stop"], case
            embeddings = block.embeddings_BWD
            if not case["stop"]:
                np.testing.assert_allclose(embeddings[0], after[index], rtol=0, atol=1e-5)
            checked += 1
    assert checked == 376


def test_without_the_contiguous_prefix_positions_behind_an_unsure_one_are_promoted():
    logits = make_logits([3, 4, 5, 6], [0.9, 0.3, 0.8, 0.7])
    after = step(make_block([MASK] * 4), logits, SpdPolicy(threshold=0.5, contiguous_prefix=False))
    assert after.tokens_BW.tolist() == [[3, MASK, 5, 6]]


def test_embedding_variants_differ_in_length_and_mix_alone():
    logits = make_logits([3, 4], [0.9, 0.6])
    soft, plain, hard = (
        step(make_block([MASK, MASK]), logits, SpdPolicy(embedding=embedding))
        for embedding in ("soft", "unnormalised", "hard")
    )
    np.testing.assert_array_equal(hard.embeddings_BWD[0], TABLE[[3, 4]])
    mixed = 0.6 * TABLE[4] + 0.4 * TABLE[MASK]
    np.testing.assert_allclose(plain.embeddings_BWD[0, 1], mixed, rtol=1e-5)
    length = 0.6 * np.linalg.norm(TABLE[4]) + 0.4 * np.linalg.norm(TABLE[MASK])
    np.testing.assert_allclose(soft.embeddings_BWD[0, 1], mixed * length / np.linalg.norm(mixed), rtol=1e-4)
    assert soft.tokens_BW.tolist() == plain.tokens_BW.tolist() == hard.tokens_BW.tolist()


@pytest.mark.parametrize(
    ("tokens", "confidences", "stops"),
    [
        ([3, 4], [0.8, 0.8], {"either", "consistency"}),  # nothing changes
        ([3, 5], [0.95, 0.95], {"either", "confidence"}),  # all accepted
        ([3, 5], [0.95, 0.8], set()),
        ([3, 4], [0.95, 0.95], {"either", "consistency", "confidence"}),
    ],
)
def test_stop_rules(tokens, confidences, stops):
    block = make_block([3, 4], active=[True, True])
    for rule in STOP_RULES:  # "never" is in no set
        after = step(block, make_logits(tokens, confidences), SpdPolicy(stop=rule))
        assert bool(after.stopped_B[0]) == (rule in stops), rule
        np.testing.assert_allclose(after.confidence_BW[0], confidences, rtol=1e-5)


def test_a_decoded_token_is_predicted_again_at_any_confidence_and_the_prompt_stays():
    block = make_block([3, 4, 5, MASK], active=[False, True, True, True])
    after = step(block, make_logits([9, 8, 5, 7], [0.95, 0.2, 0.3, 0.4]), SpdPolicy(threshold=0.5))
    assert after.tokens_BW.tolist() == [[3, 8, 5, 7]]
    assert after.stopped_B.tolist() == [False]
    assert after.active_BW.tolist() == block.active_BW.tolist()


def test_embeddings_are_hard_in_the_prompt_and_at_masks_and_soft_where_decoded():
    block = make_block([3, MASK, MASK, MASK])
    after = step(block, make_logits([9, 8, MASK, 7], [0.9, 0.6, 0.7, 0.3]), SpdPolicy(threshold=0.5))
    assert after.tokens_BW.tolist() == [[3, 8, MASK, MASK]]
    np.testing.assert_array_equal(after.embeddings_BWD[0, [0, 2, 3]], TABLE[[3, MASK, MASK]])
    mixed = 0.6 * TABLE[8] + 0.4 * TABLE[MASK]
    length = 0.6 * np.linalg.norm(TABLE[8]) + 0.4 * np.linalg.norm(TABLE[MASK])
    np.testing.assert_allclose(after.embeddings_BWD[0, 1], mixed * length / np.linalg.norm(mixed), rtol=1e-5)


def test_embeddings_keep_the_dtype_of_the_table():
    table = jnp.asarray(TABLE, jnp.bfloat16)
    step = jax.jit(lambda block, logits: spd_step(block, logits, KEYS, lambda t: table[t], SpdPolicy(), MASK))
    after = step(make_block([MASK, MASK]), make_logits([1, 2], [0.6, 0.6]))
    assert after.embeddings_BWD.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("before", "predicted", "confidence", "stopped"),
    [
        ([MASK, MASK, MASK], [1, 2, 3], [0.91, 0.92, 0.95], True),  # all accepted, although all changed
        ([MASK, MASK, MASK], [1, 2, 3], [0.91, 0.89, 0.95], False),
        ([1, 2, 3], [1, 2, 3], [0.2, 0.2, 0.2], True),  # nothing changed
        ([1, 2, 3], [1, 2, 4], [0.2, 0.2, 0.2], False),
        ([1, 2, MASK], [1, 2, MASK], [0.2, 0.2, 0.2], True),  # it stays masked: nothing changed
    ],
)
def test_when_a_block_stops(before, predicted, confidence, stopped):
    after = step(make_block(before, active=[True] * 3), make_logits(predicted, confidence), SpdPolicy(threshold=0.0))
    assert after.stopped_B.tolist() == [stopped]
    assert after.tokens_BW.tolist() == [predicted]  # the last write stands


def test_unsure_positions_of_the_prompt_do_not_keep_a_block_from_stopping():
    after = step(make_block([3, MASK]), make_logits([9, 1], [0.2, 0.95]), SpdPolicy())
    assert after.stopped_B.tolist() == [True]


def test_predictions_take_the_lowest_index_on_ties_and_the_softmax_as_confidence():
    logits = jnp.array([[[0.0, 2.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0]]])
    tokens, confidence = predict(logits, 0.0, KEYS)
    assert tokens.tolist() == [[1, 0]]
    np.testing.assert_allclose(confidence[0], [np.exp(2) / (1 + 2 * np.exp(2) + np.exp(-1)), 0.25], rtol=1e-6)


def test_bfloat16_logits_give_float32_confidences():
    logits = jax.random.normal(jax.random.key(0), (1, 4, 50), jnp.bfloat16)
    _, confidence = predict(logits, 0.0, KEYS)
    _, wide = predict(logits.astype(jnp.float32), 0.0, KEYS)
    assert confidence.dtype == jnp.float32
    np.testing.assert_array_equal(confidence, wide)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_draws_from_the_sharpened_softmax_and_measures_at_temperature_one(temperature):
    scores, draws = np.array([1.0, 0.0, 2.0, -1.0]), 4000
    logits = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (2, draws, 4))
    tokens, confidence = predict(logits, temperature, jax.random.split(jax.random.key(1), 2))
    sharpened, plain = (np.exp(z) / np.exp(z).sum() for z in (scores / temperature, scores))
    frequency = np.bincount(np.asarray(tokens).ravel(), minlength=4) / (2 * draws)
    assert (np.abs(frequency - sharpened) < 5 * np.sqrt(sharpened * (1 - sharpened) / (2 * draws))).all()
    np.testing.assert_allclose(confidence, plain[tokens], rtol=1e-5)
    assert (tokens[0] != tokens[1]).any()  # rows have keys of their own


def test_a_sampled_step_depends_on_the_key():
    block, logits = make_block([MASK] * 4), make_logits([1, 2, 3, 4], [0.2] * 4)
    policy = SpdPolicy(threshold=0.0, temperature=1.0)
    first, again, other = (step(block, logits, policy, jax.random.split(jax.random.key(s), 1)) for s in (0, 0, 1))
    assert first.tokens_BW.tolist() == again.tokens_BW.tolist() != other.tokens_BW.tolist()


@pytest.mark.parametrize("policy", [SpdPolicy, ThresholdPolicy, HierarchicalPolicy, CreditPolicy])
def test_senseless_policies_are_refused_by_name_and_number(policy):
    for name in {"threshold", "accept_threshold", "low_threshold", "decay"} & set(policy.__dataclass_fields__):
        for value in (-0.1, 1.5, float("nan")):
            with pytest.raises(InputError, match=f"{name}={value}"):
                policy(**{name: value})
        policy(**{name: 0.0}), policy(**{name: 1.0})
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match=f"temperature={value}"):
            policy(temperature=value)
    with pytest.raises(InputError, match="max_steps=0 must be at least 1"):
        policy(max_steps=0)
    for name in ("stop", "embedding"):
        with pytest.raises(InputError, match=f"{name}='none'"):
            SpdPolicy(**{name: "none"})
