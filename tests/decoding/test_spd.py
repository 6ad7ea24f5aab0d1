import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.decoding.block import Block
from dmax_jax.decoding.policies import STOP_RULES, CreditPolicy, HierarchicalPolicy, SpdPolicy, ThresholdPolicy
from dmax_jax.decoding.prediction import predict
from dmax_jax.decoding.spd import embed_softly, spd_step
from dmax_jax.errors import InputError
from tests.conftest import GOLDEN
from tests.decoding.blocks import MASK, TABLE, embed, make_block, make_logits, step
from tests.models import load_arrays


def embeddings_of(block, policy):
    """Of a block's positions, as its next forward gets them."""
    return np.asarray(jax.jit(lambda block: embed_softly(block, embed, policy, MASK))(block)[0])


def test_steps_equal_the_official_code():
    golden, arrays = json.loads((GOLDEN / "spd_steps.json").read_text()), load_arrays(GOLDEN / "spd_steps.npz")
    table, logits, after = (arrays[name] for name in ("embedding", "logits", "embeddings_after"))

    @jax.jit
    def golden_step(block, logits_BWV, policy):
        prediction = predict(logits_BWV, golden["mask_id"])
        block, stopped_B = spd_step(block, prediction, policy, golden["mask_id"])
        return block, stopped_B, embed_softly(block, lambda t: jnp.asarray(table)[t], policy, golden["mask_id"])

    for index, case in enumerate(golden["steps"]):
        tokens, active = np.array([case["before"]], np.int32), np.array([case["active"]])
        block = Block(tokens, active, np.zeros(tokens.shape, np.float32), np.zeros(1, np.int32))
        block, stopped, embeddings = golden_step(block, logits[index][None], SpdPolicy(threshold=case["threshold"]))
        assert block.tokens_BW[0].tolist() == case["after"], case
        assert bool(stopped[0]) == case["stop"], case
        if not case["stop"]:
            np.testing.assert_allclose(embeddings[0], after[index], rtol=0, atol=1e-5)
    assert len(golden["steps"]) == 376


def test_without_the_contiguous_prefix_positions_behind_an_unsure_one_are_promoted():
    logits = make_logits([3, 4, 5, 6], [0.9, 0.3, 0.8, 0.7])
    after, _ = step(make_block([MASK] * 4), logits, SpdPolicy(threshold=0.5, contiguous_prefix=False))
    assert after.tokens_BW.tolist() == [[3, MASK, 5, 6]]


def test_embedding_variants_differ_in_length_and_mix_alone():
    logits = make_logits([3, 4], [0.9, 0.6])
    block, _ = step(make_block([MASK, MASK]), logits, SpdPolicy())
    soft, plain, hard = (
        embeddings_of(block, SpdPolicy(embedding=embedding)) for embedding in ("soft", "unnormalised", "hard")
    )
    np.testing.assert_array_equal(hard, TABLE[[3, 4]])
    mixed = 0.6 * TABLE[4] + 0.4 * TABLE[MASK]
    np.testing.assert_allclose(plain[1], mixed, rtol=1e-5)
    length = 0.6 * np.linalg.norm(TABLE[4]) + 0.4 * np.linalg.norm(TABLE[MASK])
    np.testing.assert_allclose(soft[1], mixed * length / np.linalg.norm(mixed), rtol=1e-4)


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
        after, stopped = step(block, make_logits(tokens, confidences), SpdPolicy(stop=rule))
        assert bool(stopped[0]) == (rule in stops), rule
        np.testing.assert_allclose(after.confidence_BW[0], confidences, rtol=1e-5)


def test_a_decoded_token_is_predicted_again_at_any_confidence_and_the_prompt_stays():
    block = make_block([3, 4, 5, MASK], active=[False, True, True, True])
    after, stopped = step(block, make_logits([9, 8, 5, 7], [0.95, 0.2, 0.3, 0.4]), SpdPolicy(threshold=0.5))
    assert after.tokens_BW.tolist() == [[3, 8, 5, 7]]
    assert stopped.tolist() == [False]
    assert after.active_BW.tolist() == block.active_BW.tolist()


def test_embeddings_are_hard_in_the_prompt_and_at_masks_and_soft_where_decoded():
    block = make_block([3, MASK, MASK, MASK])
    after, _ = step(block, make_logits([9, 8, MASK, 7], [0.9, 0.6, 0.7, 0.3]), SpdPolicy(threshold=0.5))
    assert after.tokens_BW.tolist() == [[3, 8, MASK, MASK]]
    embeddings = embeddings_of(after, SpdPolicy())
    np.testing.assert_array_equal(embeddings[[0, 2, 3]], TABLE[[3, MASK, MASK]])
    mixed = 0.6 * TABLE[8] + 0.4 * TABLE[MASK]
    length = 0.6 * np.linalg.norm(TABLE[8]) + 0.4 * np.linalg.norm(TABLE[MASK])
    np.testing.assert_allclose(embeddings[1], mixed * length / np.linalg.norm(mixed), rtol=1e-5)


def test_embeddings_keep_the_dtype_of_the_table():
    table = jnp.asarray(TABLE, jnp.bfloat16)
    softly = jax.jit(lambda block: embed_softly(block, lambda t: table[t], SpdPolicy(), MASK))
    assert softly(make_block([MASK, 3])).dtype == jnp.bfloat16


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
    block, logits = make_block(before, active=[True] * 3), make_logits(predicted, confidence)
    after, found = step(block, logits, SpdPolicy(threshold=0.0))
    assert found.tolist() == [stopped]
    assert after.tokens_BW.tolist() == [predicted]  # the last write stands


def test_unsure_positions_of_the_prompt_do_not_keep_a_block_from_stopping():
    _, stopped = step(make_block([3, MASK]), make_logits([9, 1], [0.2, 0.95]), SpdPolicy())
    assert stopped.tolist() == [True]


def test_a_sampled_step_depends_on_the_key():
    block, logits = make_block([MASK] * 4), make_logits([1, 2, 3, 4], [0.2] * 4)
    policy = SpdPolicy(threshold=0.0, temperature=1.0)
    first, again, other = (step(block, logits, policy, jax.random.split(jax.random.key(s), 1))[0] for s in (0, 0, 1))
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
