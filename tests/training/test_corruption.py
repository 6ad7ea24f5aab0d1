import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.training.batch import Batch, supervised_positions
from dmax_jax.training.corruption import draw_masks, draw_predictions, random_tokens, sample_keys

KEY = jax.random.key(3)
EOS = 9


def make_batch(rows: int, length: int, prompt: int = 0, **changes) -> Batch:
    batch = Batch(
        tokens_BT=jnp.zeros((rows, length), jnp.int32),
        prompt_length_B=jnp.full(rows, prompt),
        index_B=jnp.arange(rows),
        epoch_B=jnp.zeros(rows, jnp.int32),
        on_policy_B=jnp.ones(rows, bool),
    )
    return batch.replace(**changes)


@jax.jit
def draw(batch, low, high):
    return draw_masks(batch, sample_keys(KEY, batch), low, high)


@pytest.mark.parametrize(
    ("tokens", "prompt", "padding", "supervised"),
    [
        ([1, 2, 3, 4, 5, EOS, EOS, EOS], 2, 32, "..++++++"),
        ([1, 2, 3, 4, 5, EOS, EOS, EOS], 2, 2, "..+++++."),
        ([1, 2, 3, 4, 5, EOS, EOS, EOS], 2, 0, "..+++..."),
        ([1, 2, 3, EOS, 5, EOS, EOS, EOS], 1, 1, ".+++++.."),  # an EOS inside the answer is no padding
        ([1, 2, 3, 4, 5, 6, 7, 8], 3, 2, "...+++++"),  # no padding at all
        ([EOS, EOS, EOS, EOS, EOS, EOS, EOS, EOS], 0, 3, "+++....."),  # nothing but padding
        ([1, 2, 3, EOS, EOS, EOS, EOS, EOS], 5, 3, ".....+.."),  # the prompt ends in EOS
    ],
)
def test_supervised_positions(tokens, prompt, padding, supervised):
    batch = make_batch(1, 8, prompt, tokens_BT=jnp.array([tokens]))
    assert supervised_positions(batch, EOS, padding).tolist() == [[c == "+" for c in supervised]]


def test_at_most_32_of_the_trailing_eos_count():
    tokens = jnp.full((1, 100), EOS).at[0, :10].set(1)
    found = supervised_positions(make_batch(1, 100, 4, tokens_BT=tokens), EOS, 32)
    assert np.flatnonzero(found).tolist() == list(range(4, 42))


def test_the_share_of_masks_is_the_rate_of_each_sample():
    rows, length, prompt = 64, 500, 100
    masked, rate = draw(make_batch(rows, length, prompt), 0.3, 0.9)
    assert not masked[:, :prompt].any()
    assert ((rate >= 0.3) & (rate < 0.9)).all()
    assert len(np.unique(rate)) == rows
    assert abs(rate.mean() - 0.6) < 5 * 0.6 / np.sqrt(12 * rows)
    share = masked[:, prompt:].mean(1)
    assert (np.abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / (length - prompt))).all()
    # Every position alike, the padding at the end included.
    shares = np.split(np.asarray(masked[:, prompt:]).mean(0), 4)
    assert (np.abs(np.mean(shares, axis=1) - rate.mean()) < 0.03).all()


@pytest.mark.parametrize(("low", "high", "share"), [(1.0, 1.0, 1.0), (0.75, 0.75, 0.75)])
def test_a_fixed_rate(low, high, share):
    masked, rate = draw(make_batch(64, 500, 0), low, high)
    np.testing.assert_allclose(rate, share)
    assert abs(masked.mean() - share) <= 5 * np.sqrt(share * (1 - share) / masked.size)


def test_the_noise_of_a_sample_is_its_own():
    """Neither its place in the batch nor its neighbours matter; index, epoch and stream do."""
    batch = make_batch(6, 40)
    masked, rate = draw(batch, 0.3, 0.9)
    order = np.array([4, 2, 0, 5, 1, 3])
    shuffled, shuffled_rate = draw(jax.tree.map(lambda leaf: leaf[order], batch), 0.3, 0.9)
    np.testing.assert_array_equal(shuffled, masked[order])
    np.testing.assert_array_equal(shuffled_rate, rate[order])
    for change in ({"index_B": batch.index_B + 6}, {"epoch_B": batch.epoch_B + 1}, {"on_policy_B": ~batch.on_policy_B}):
        other, _ = draw(batch.replace(**change), 0.3, 0.9)
        assert (other != masked).any(axis=1).all()
    # Epoch 1 of sample 0 is not epoch 0 of sample 1.
    keys = sample_keys(KEY, make_batch(2, 1, index_B=jnp.array([0, 1]), epoch_B=jnp.array([1, 0])))
    assert keys[0] != keys[1]


def test_random_tokens_are_uniform_over_the_whole_vocabulary():
    tokens = jax.jit(random_tokens, static_argnums=(1, 2))(jax.random.split(KEY, 20), 1000, 16)
    count = np.bincount(np.asarray(tokens).ravel(), minlength=16)
    assert len(count) == 16
    assert (np.abs(count - 1250) < 5 * np.sqrt(1250)).all()


def test_predictions_are_the_argmax_or_draws_from_the_softmax():
    scores = np.array([0.0, 1.5, 1.0, -1.0], np.float32)
    logits = jnp.broadcast_to(scores, (2, 5000, 4))
    draw = jax.jit(draw_predictions, static_argnums=2)
    keys, other_keys = jax.random.split(KEY, 2), jax.random.split(jax.random.key(4), 2)
    probability = np.exp(scores) / np.exp(scores).sum()
    for some_keys in (keys, other_keys):
        tokens, confidence = draw(logits, some_keys, "argmax")
        assert (tokens == 1).all()
        np.testing.assert_allclose(confidence, probability[1], rtol=1e-6)
    sampled, confidence = (np.asarray(x) for x in draw(logits, keys, "sample"))
    frequency = np.bincount(sampled.ravel(), minlength=4) / sampled.size
    assert (np.abs(frequency - probability) < 5 * np.sqrt(probability * (1 - probability) / sampled.size)).all()
    np.testing.assert_allclose(confidence, probability[sampled], rtol=1e-6)
    np.testing.assert_array_equal(draw(logits, keys, "sample")[0], sampled)
    assert (draw(logits, other_keys, "sample")[0] != sampled).any(axis=1).all()
    assert (sampled[0] != sampled[1]).any()
