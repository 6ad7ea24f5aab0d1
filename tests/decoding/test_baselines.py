import jax
import numpy as np
import pytest

from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, ThresholdPolicy
from dmax_jax.decoding.prediction import predict
from tests.decoding.blocks import MASK, VOCABULARY, make_block, make_logits, step

ROW_KEYS = jax.random.split(jax.random.key(0), 4)


def assert_step(policy, before, predicted, confidence, after, stopped):
    whole = make_block(before, active=[True] * len(before))
    block, found = step(whole, make_logits(predicted, confidence), policy)
    assert block.tokens_BW.tolist() == [after]
    assert found.tolist() == [stopped]


@pytest.mark.parametrize(
    ("before", "predicted", "confidence", "after", "stopped"),
    [
        ([MASK] * 4, [1, 2, 3, 4], [0.9, 0.4, 0.6, 0.5], [1, MASK, 3, MASK], False),
        ([MASK] * 4, [1, 2, 3, 4], [0.6, 0.7, 0.8, 0.9], [1, 2, 3, 4], True),
        ([MASK] * 4, [1, 2, 3, 4], [0.2, 0.4, 0.3, 0.1], [MASK, 2, MASK, MASK], False),  # at least the best
        ([MASK] * 4, [1, 2, 3, 4], [0.3, 0.299995, 0.2999, 0.3], [1, 2, MASK, 4], False),  # with its near ties
        ([5, 6, MASK, MASK], [1, 6, 3, 4], [0.9, 0.1, 0.9, 0.2], [5, 6, 3, MASK], False),  # committed is final
        # A position that predicts the mask is not committed, and is not the best that the others are measured by.
        ([MASK] * 4, [1, MASK, 3, 4], [0.3, 0.9, 0.2, 0.1], [1, MASK, MASK, MASK], False),
        ([5, MASK, MASK, 6], [1, MASK, MASK, 4], [0.9] * 4, [5, MASK, MASK, 6], True),  # commits nothing: the end
        ([5, 6, MASK, 6], [1, 2, 3, 4], [0.2] * 4, [5, 6, 3, 6], True),
    ],
)
def test_threshold(before, predicted, confidence, after, stopped):
    assert_step(ThresholdPolicy(threshold=0.55), before, predicted, confidence, after, stopped)


def test_a_confidence_equal_to_the_threshold_is_enough():
    logits = make_logits([1, 2], [0.9, 0.6])
    threshold = float(predict(logits, MASK).confidence_BW[0, 1])
    block, _ = step(make_block([MASK, MASK]), logits, ThresholdPolicy(threshold=threshold))
    assert block.tokens_BW.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("before", "predicted", "confidence", "after", "stopped"),
    [
        # The best of each run, if above 0.3; in the last run none is.
        ([MASK, MASK, 5, MASK, MASK, 6, MASK], [1, 2, 9, 3, 4, 9, 7], [0.4, 0.5, 0.9, 0.6, 0.35, 0.9, 0.25],
         [MASK, 2, 5, 3, MASK, 6, MASK], False),
        # And whatever is above the threshold of 0.8.
        ([MASK, MASK, MASK, 5], [1, 2, 3, 4], [0.9, 0.5, 0.85, 0.9], [1, MASK, 3, 5], False),
        # The best of all although nothing is above the low threshold.
        ([MASK, MASK, 5, MASK], [1, 2, 9, 3], [0.15, 0.2, 0.9, 0.25], [MASK, MASK, 5, 3], False),
        # The first of equals.
        ([MASK, MASK, 5, MASK], [1, 2, 9, 3], [0.5, 0.5, 0.9, 0.5], [1, MASK, 5, 3], False),
        # A mask prediction wins its run and the row, and is not committed.
        ([MASK, MASK, 5, MASK], [1, MASK, 9, 3], [0.4, 0.7, 0.9, 0.5], [MASK, MASK, 5, 3], False),
        ([MASK, MASK, 5, 6], [1, MASK, 9, 3], [0.4, 0.7, 0.9, 0.9], [MASK, MASK, 5, 6], True),
        ([5, MASK, 6, MASK], [1, 2, 3, 4], [0.9, 0.4, 0.9, 0.4], [5, 2, 6, 4], True),
    ],
)  # fmt: skip
def test_hierarchical(before, predicted, confidence, after, stopped):
    assert_step(HierarchicalPolicy(threshold=0.8, low_threshold=0.3), before, predicted, confidence, after, stopped)


def test_hierarchical_thresholds_themselves_are_not_enough():
    logits = make_logits([1, 2, 3], [0.9, 0.6, 0.4])
    high, low = (float(p) for p in predict(logits, MASK).confidence_BW[0, 1:])
    policy = HierarchicalPolicy(threshold=high, low_threshold=low)
    together, _ = step(make_block([MASK, MASK, MASK]), logits, policy)
    assert together.tokens_BW.tolist() == [[1, MASK, MASK]]
    apart, _ = step(make_block([MASK, 5, MASK]), make_logits([1, 9, 3], [0.9, 0.6, 0.4]), policy)
    assert apart.tokens_BW.tolist() == [[1, 5, MASK]]


def credit_reference(tokens, logits_steps, policy):
    """Credit decoding of one block in float64: tokens and credit after every step."""
    tokens, credit = np.array(tokens), np.zeros((len(tokens), VOCABULARY))
    for logits in np.asarray(logits_steps, np.float64):
        masked = tokens == MASK
        credit = policy.decay * credit
        for position in np.flatnonzero(masked):
            probs = np.exp(logits[position]) / np.exp(logits[position]).sum()
            credit[position, probs.argmax()] += probs.max() ** policy.gamma
        raised = logits + masked[:, None] * policy.alpha * np.log(1 + credit)
        probs = np.exp(raised) / np.exp(raised).sum(-1, keepdims=True)
        top, p = probs.argmax(-1), probs.max(-1)
        candidate = masked & (top != MASK)
        commit = candidate & (p >= policy.threshold)
        if candidate.any() and not commit.any():
            commit[np.where(candidate, p, -1).argmax()] = True
        tokens = np.where(commit, top, tokens)
        yield tokens.tolist(), credit


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "policy", [CreditPolicy(threshold=0.6), CreditPolicy(threshold=0.5, alpha=3.0, gamma=1.0, decay=0.5)]
)
def test_credit(policy, seed):
    rng = np.random.default_rng(seed)
    # Steps that resemble each other, so that credit builds up.
    logits_steps = (rng.normal(size=(1, 8, VOCABULARY)) + rng.normal(size=(6, 8, VOCABULARY))).astype(np.float32)
    before = [3, MASK, MASK, MASK, MASK, MASK, MASK, MASK]
    block = make_block(before).replace(credit_BWV=np.zeros((1, 8, VOCABULARY), np.float32))
    plain = make_block(before)
    for logits, (tokens, credit) in zip(logits_steps, credit_reference(before, logits_steps, policy), strict=True):
        block, _ = step(block, logits[None], policy)
        plain, _ = step(plain, logits[None], ThresholdPolicy(threshold=policy.threshold))
        assert block.tokens_BW[0].tolist() == tokens
        np.testing.assert_allclose(block.credit_BWV[0], credit, rtol=1e-5, atol=1e-6)
    if policy.alpha > 1:
        assert plain.tokens_BW.tolist() != block.tokens_BW.tolist()  # the credit had a say


@pytest.mark.parametrize("policy", [ThresholdPolicy, HierarchicalPolicy, CreditPolicy])
def test_rows_are_independent_and_a_temperature_draws_by_the_rows_key(policy):
    policy = policy(threshold=0.1, temperature=1.0)
    credit = np.zeros((1, 4, VOCABULARY), np.float32)
    rows = [make_block(tokens) for tokens in ([MASK] * 4, [1, MASK, MASK, 2], [MASK] * 4, [MASK] * 4)]
    blocks = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(row.replace(credit_BWV=credit) for row in rows))
    logits = np.concatenate([make_logits([1 + row // 2, 2, 3, 4], [0.3, 0.2, 0.4, 0.25]) for row in range(4)])
    tokens = np.asarray(step(blocks, logits, policy, ROW_KEYS)[0].tokens_BW)
    order = np.array([2, 0, 3, 1])
    shuffled, _ = step(jax.tree.map(lambda leaf: leaf[order], blocks), logits[order], policy, ROW_KEYS[order])
    np.testing.assert_array_equal(shuffled.tokens_BW, tokens[order])
    assert tokens[2].tolist() != tokens[3].tolist()  # they differ in the key alone
