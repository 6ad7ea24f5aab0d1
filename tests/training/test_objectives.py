import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.checkpoint.names import tensor_names
from dmax_jax.training.batch import Batch, supervised_positions
from dmax_jax.training.corruption import draw_masks, random_tokens, sample_keys
from dmax_jax.training.losses import Noisy, Problem, Reader, loss_gradients, read_clean, read_noisy, sequence_loss
from dmax_jax.training.objectives import OBJECTIVES, batch_gradients, objective_gradients
from dmax_jax.training.rollout import first_input, roll_out
from tests.models import SMALL, golden_model, load_arrays, small_params
from tests.training.batches import BLOCK, LENGTH, PADDING, ROWS, make_batch, make_problem

PROBLEM = make_problem()
KEY = jax.random.key(11)
MASK = SMALL.mask_token_id


@functools.partial(jax.jit, static_argnames="problem")
def gradients(params, inputs, batch, weights, keys, *, problem):
    """Loss, evidence and gradients of one loss, with one differentiated function around both streams."""

    def loss(params):
        clean, loads = read_clean(params, batch.tokens_BT, problem)
        value, seen = sequence_loss(Reader(params, clean), noisy_of(inputs), batch, weights, keys, problem)
        return value, seen.replace(loads=jax.tree.map(jnp.add, seen.loads, loads))

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="problem")
def forward(params, inputs, clean, *, problem):
    """The noisy stream's logits."""
    return read_noisy(Reader(params, read_clean(params, clean, problem)[0]), noisy_of(inputs), problem)[0]


@functools.partial(jax.jit, static_argnames=("problem", "steps"))
def rolled(params, inputs, batch, masked, keys, *, problem, steps) -> Noisy:
    reader = Reader(params, read_clean(params, batch.tokens_BT, problem)[0])
    return roll_out(reader, first_input(inputs, problem), masked, keys, problem, steps)


def noisy_of(inputs) -> Noisy:
    return inputs if isinstance(inputs, Noisy) else Noisy(jnp.asarray(inputs))


total = jax.jit(batch_gradients, static_argnames="problem")


@dataclasses.dataclass
class Case:
    """A batch with its noise; some of its masked tokens are what the model predicts there."""

    batch: Batch
    keys: jax.Array
    masked: jax.Array
    rate: jax.Array
    supervised: np.ndarray

    @property
    def weights(self) -> jax.Array:
        return jnp.asarray(mean_weights(self.supervised), jnp.float32)

    @property
    def masked_inputs(self) -> np.ndarray:
        return np.where(self.masked, MASK, self.batch.tokens_BT).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return small_params()


@pytest.fixture(scope="module")
def case(params) -> Case:
    batch = make_batch()
    keys = sample_keys(KEY, batch)
    masked, rate = jax.jit(draw_masks)(batch, keys, 0.5, 0.8)
    predictable = np.asarray(masked & (batch.tokens_BT != SMALL.eos_token_id)) & (np.arange(LENGTH) % 2 == 0)
    for block in range(0, LENGTH, BLOCK):  # a block's predictions depend on the clean tokens of earlier blocks
        inputs = jnp.where(masked, MASK, batch.tokens_BT)
        best = forward(params, inputs, batch.tokens_BT, problem=PROBLEM).argmax(-1)
        here = predictable & (np.arange(LENGTH) // BLOCK == block // BLOCK)
        batch = batch.replace(tokens_BT=jnp.where(here, best, batch.tokens_BT).astype(jnp.int32))
    return Case(batch, keys, masked, rate, np.asarray(supervised_positions(batch, SMALL.eos_token_id, PADDING)))


def mean_weights(chosen):
    return chosen / np.maximum(chosen.sum(1, keepdims=True), 1)


def assert_close_trees(found, expected, tolerance):
    """Every leaf within a relative norm; leaves that should be zero are zero."""

    def check(path, a, b):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found, expected)


def golden_gradients(path, config):
    """The gradients as a parameter tree; the bias of the router has none."""
    tensors = load_arrays(path)

    def read(stored):
        parts = [tensors.pop(name, np.zeros(config.num_experts)) for name in stored.tensors]
        return np.stack(parts) if stored.experts else parts[0]

    tree = jax.tree.map(read, tensor_names(config))
    assert not tensors
    return tree


def test_losses_rollout_and_gradients_equal_the_official_code(golden):
    config, params = golden_model(golden.name)
    expected = load_arrays(golden / "oput.npz")
    clean, noisy, labels = expected["clean"], expected["noisy"], expected["labels"]
    problem = Problem(config, PROBLEM.objective, int(expected["block_length"]), "float32")
    batch = jax.tree.map(lambda leaf: leaf[:2], make_batch()).replace(tokens_BT=clean)
    weights, keys = mean_weights(labels >= 0).astype(np.float32), jax.random.split(KEY, 2)
    run = functools.partial(gradients, params, batch=batch, weights=weights, keys=keys, problem=problem)

    (_, first), _ = run(inputs=noisy)
    masks = noisy == config.mask_token_id
    predicted = np.where(masks, first.drawn_BT, noisy)
    np.testing.assert_array_equal(predicted[masks], expected["rollout_argmax"][masks])
    np.testing.assert_array_equal(np.where(expected["on_policy"][:, None], predicted, noisy), expected["inputs"])
    (_, second), _ = run(inputs=predicted)
    np.testing.assert_allclose(first.loss_B, expected["masked_loss"], rtol=1e-4)
    np.testing.assert_allclose(second.loss_B, expected["predicted_loss"], rtol=1e-4)

    (loss, seen), grads = run(inputs=expected["inputs"])
    np.testing.assert_allclose(seen.loss_B, expected["loss_per_sequence"], rtol=1e-4)
    np.testing.assert_allclose(loss, expected["loss_per_sequence"].mean(), rtol=1e-4)
    assert_close_trees(grads, golden_gradients(golden / "oput_grads.npz", config), 1e-3)


def manual_rollout(params, case, steps):
    inputs = case.masked_inputs
    for _ in range(steps):
        best = forward(params, inputs, case.batch.tokens_BT, problem=PROBLEM).argmax(-1)
        inputs = np.where(case.masked, best, inputs).astype(np.int32)
    return inputs


@pytest.mark.parametrize("steps", [1, 2])
def test_joint_gradients_are_the_sum_of_two_losses(params, case, steps):
    batch, problem = case.batch, make_problem(rollout_steps=steps)
    found = total(params, batch, case.masked, case.rate, case.keys, problem=problem)

    predicted = manual_rollout(params, case, steps)
    loss_of = functools.partial(gradients, params, batch=batch, weights=case.weights, keys=case.keys, problem=PROBLEM)
    (first_loss, first), first_grads = loss_of(inputs=case.masked_inputs)
    (second_loss, second), second_grads = loss_of(inputs=predicted)
    assert_close_trees(found.grads, jax.tree.map(jnp.add, first_grads, second_grads), 1e-5)
    np.testing.assert_allclose(found.metrics["masked_loss"].value, first_loss, rtol=1e-6)
    np.testing.assert_allclose(found.metrics["predicted_loss"].value, second_loss, rtol=1e-6)
    np.testing.assert_allclose(found.metrics["loss"].value, first_loss + second_loss, rtol=1e-6)
    _, clean_loads = jax.jit(read_clean, static_argnums=2)(params, batch.tokens_BT, PROBLEM)
    once = jax.tree.map(lambda a, b, clean: a + b - clean, first.loads, second.loads, clean_loads)
    jax.tree.map(np.testing.assert_array_equal, found.loads, once)  # the clean stream runs and counts once

    right = predicted == batch.tokens_BT
    chosen = case.supervised & np.asarray(case.masked) & (predicted != MASK)
    np.testing.assert_allclose(found.metrics["rollout_accuracy"].value, right[chosen].mean(), rtol=1e-6)
    repaired = np.asarray(second.argmax_BT == batch.tokens_BT)[chosen & ~right]
    np.testing.assert_allclose(found.metrics["repaired"].value, repaired.mean(), rtol=1e-6)
    assert 0 < right[chosen].mean() < 1


def test_soft_rollouts_carry_no_gradient(params, case):
    """The gradients are those of the two losses on inputs that were rolled out before, mixed embeddings included."""
    problem = make_problem(rollout_embedding="soft", rollout_promotion="prefix", rollout_steps=2)
    found = total(params, case.batch, case.masked, case.rate, case.keys, problem=problem)
    predicted = rolled(params, case.masked_inputs, case.batch, case.masked, case.keys, problem=problem, steps=2)
    assert (predicted.confidence_BT > 0).any()
    loss_of = functools.partial(gradients, params, batch=case.batch, weights=case.weights, keys=case.keys)
    (first_loss, _), first_grads = loss_of(inputs=case.masked_inputs, problem=PROBLEM)
    (second_loss, _), second_grads = loss_of(inputs=predicted, problem=PROBLEM)
    assert_close_trees(found.grads, jax.tree.map(jnp.add, first_grads, second_grads), 1e-5)
    np.testing.assert_allclose(found.metrics["loss"].value, first_loss + second_loss, rtol=1e-6)


def test_a_hard_token_of_zeros_has_gradients_beside_soft_ones(params, case):
    table = params.embed.at[int(case.batch.tokens_BT[0, 0])].set(0)  # a prompt's token
    problem = make_problem(rollout_embedding="soft")
    found = total(params.replace(embed=table), case.batch, case.masked, case.rate, case.keys, problem=problem)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.grads))


def test_alternating_gradients_are_those_of_one_loss_per_row(params, case):
    batch = case.batch
    problem = make_problem(schedule="alternating", rollout_steps=2)
    run = functools.partial(total, params, masked_BT=case.masked, rate_B=case.rate, keys_B=case.keys, problem=problem)
    found = run(batch=batch)
    on_policy = np.asarray(batch.on_policy_B)
    inputs = np.where(on_policy[:, None], manual_rollout(params, case, 2), case.masked_inputs)
    (loss, seen), grads = gradients(params, inputs, batch, case.weights, case.keys, problem=PROBLEM)
    assert_close_trees(found.grads, grads, 1e-5)
    np.testing.assert_allclose(found.metrics["loss"].value, loss, rtol=1e-6)
    np.testing.assert_allclose(found.metrics["masked_loss"].value, seen.loss_B[~on_policy].mean(), rtol=1e-6)
    np.testing.assert_allclose(found.metrics["predicted_loss"].value, seen.loss_B[on_policy].mean(), rtol=1e-6)
    chosen = case.supervised & np.asarray(case.masked) & on_policy[:, None] & (inputs != MASK)
    right = inputs == batch.tokens_BT
    np.testing.assert_allclose(found.metrics["rollout_accuracy"].value, right[chosen].mean(), rtol=1e-6)

    off = run(batch=batch.replace(on_policy_B=jnp.zeros(ROWS, bool)))
    (loss, _), grads = gradients(params, case.masked_inputs, batch, case.weights, case.keys, problem=PROBLEM)
    assert_close_trees(off.grads, grads, 1e-5)
    np.testing.assert_allclose(off.metrics["loss"].value, loss, rtol=1e-6)


def count_products(function, *args) -> int:
    """Matrix products in a function, those of loops and branches once each."""

    def walk(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name in ("dot_general", "ragged_dot_general")
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    total += walk(inner) if hasattr(inner, "eqns") else 0
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize(
    ("schedule", "rollout_steps", "losses", "forwards"),
    [("joint", 1, 2, 0), ("joint", 3, 2, 1), ("alternating", 1, 1, 1), ("alternating", 3, 1, 1)],
)
def test_the_rollout_is_outside_the_differentiated_function(params, case, schedule, rollout_steps, losses, forwards):
    """A rollout adds forwards (a loop's body counts once) and no backward; its first step may be the masked loss's.

    The clean stream is run once, forward and backward, whatever is run over it.
    """
    tokens = case.batch.tokens_BT
    problem = make_problem(schedule=schedule, rollout_steps=rollout_steps)

    def clean(p):
        return read_clean(p, tokens, PROBLEM)[0]

    def both_ways(p):
        kv, pull_back = jax.vjp(clean, p)
        return pull_back(kv)

    def read(p):
        return Reader(p, jax.eval_shape(clean, p))

    found = count_products(lambda p: batch_gradients(p, case.batch, case.masked, None, case.keys, problem), params)
    reader = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), read(params))
    loss = count_products(
        lambda r: loss_gradients(r, Noisy(tokens), case.batch, case.weights, case.keys, PROBLEM), reader
    )
    one_forward = count_products(lambda r: read_noisy(r, Noisy(tokens), PROBLEM), reader)
    assert loss > 2 * one_forward > 0
    assert found == count_products(both_ways, params) + losses * loss + forwards * one_forward


def test_a_rollout_predicts_masked_positions_again_and_again(params, case):
    found = rolled(params, case.masked_inputs, case.batch, case.masked, case.keys, problem=PROBLEM, steps=2).tokens_BT
    np.testing.assert_array_equal(found, manual_rollout(params, case, 2))
    assert (found != manual_rollout(params, case, 1)).any()
    np.testing.assert_array_equal(found[~case.masked], case.batch.tokens_BT[~case.masked])


def test_only_a_sampled_rollout_depends_on_the_keys(params, case):
    other_keys = jax.random.split(jax.random.key(1), ROWS)

    def roll(keys, problem):
        args = (params, case.masked_inputs, case.batch, case.masked, keys)
        return rolled(*args, problem=problem, steps=2).tokens_BT

    np.testing.assert_array_equal(roll(case.keys, problem=PROBLEM), roll(other_keys, problem=PROBLEM))
    sampled = make_problem(rollout="sample")
    np.testing.assert_array_equal(roll(case.keys, problem=sampled), roll(case.keys, problem=sampled))
    assert (roll(case.keys, problem=sampled) != roll(other_keys, problem=sampled)).any(axis=1).all()


def test_every_step_of_a_sampled_rollout_draws_anew(params, case):
    """Else a second step would be the first one again, from its own outcome and with its own noise."""

    def roll(inputs, steps):
        problem = make_problem(rollout="sample")
        return rolled(params, inputs, case.batch, case.masked, case.keys, problem=problem, steps=steps).tokens_BT

    repeated = roll(roll(case.masked_inputs, steps=1), steps=1)
    assert (roll(case.masked_inputs, steps=2) != repeated).any(axis=1).all()


def test_a_soft_rollout_feeds_back_what_soft_decoding_does(params, case):
    """One step by hand: the mix of Eq. 9 and 10 at the predicted positions, the table's rows everywhere else."""
    problem = make_problem(rollout_embedding="soft")
    found = rolled(params, case.masked_inputs, case.batch, case.masked, case.keys, problem=problem, steps=1)
    probs = np.exp(log_softmax(forward(params, case.masked_inputs, case.batch.tokens_BT, problem=PROBLEM)))
    best, masked = probs.argmax(-1), np.asarray(case.masked)
    soft = masked & (best != MASK)
    np.testing.assert_array_equal(found.tokens_BT, np.where(masked, best, case.batch.tokens_BT))
    np.testing.assert_allclose(found.confidence_BT, np.where(soft, probs.max(-1), 0), rtol=1e-5)

    table = np.asarray(params.embed)
    p = probs.max(-1)[:, :, None]
    mixed = p * table[best] + (1 - p) * table[MASK]
    length = p * np.linalg.norm(table[best], axis=-1, keepdims=True) + (1 - p) * np.linalg.norm(table[MASK])
    expected = np.where(
        soft[:, :, None],
        mixed * length / np.linalg.norm(mixed, axis=-1, keepdims=True),
        table[np.asarray(found.tokens_BT)],
    )
    swapped = params.replace(embed=jnp.asarray(expected.reshape(-1, table.shape[1])))  # a row for every position
    rows = np.arange(expected.shape[0] * LENGTH).reshape(-1, LENGTH)
    reader = Reader(params, read_clean(params, case.batch.tokens_BT, PROBLEM)[0])
    wanted, _ = read_noisy(Reader(swapped, reader.clean), Noisy(jnp.asarray(rows)), PROBLEM)
    logits, _ = read_noisy(reader, found, problem)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


def test_a_rollout_of_the_prefix_promotes_as_soft_decoding_does(params, case):
    problem = make_problem(rollout_promotion="prefix")
    found = rolled(params, case.masked_inputs, case.batch, case.masked, case.keys, problem=problem, steps=1).tokens_BT
    logits = forward(params, case.masked_inputs, case.batch.tokens_BT, problem=PROBLEM)
    probs = np.exp(log_softmax(logits))
    thresholds = [float(jax.random.uniform(jax.random.fold_in(key, 3))) for key in case.keys]
    for row, (masked, threshold) in enumerate(zip(np.asarray(case.masked), thresholds, strict=True)):
        for first in range(0, LENGTH, BLOCK):
            positions = [t for t in range(first, first + BLOCK) if masked[t]]
            unsure = [t for t in positions if probs[row, t].max() < threshold]
            for t in positions:
                promoted = t < min(unsure, default=LENGTH) or t == positions[0]
                assert found[row, t] == (probs[row, t].argmax() if promoted else MASK), (row, t)
    assert (np.asarray(found) == MASK).any()


@functools.partial(jax.jit, static_argnames="problem")
def metrics_of(params, batch, masked, rate, keys, problem):
    metrics = batch_gradients(params, batch, masked, rate, keys, problem).metrics  # XLA drops the gradients
    return {name: mean.value for name, mean in metrics.items()}


def run(kind, params, case, **objective):
    problem = make_problem(kind=kind, **objective)
    return metrics_of(params, case.batch, case.masked, case.rate, case.keys, problem)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(log_probs, tokens):
    return -np.take_along_axis(log_probs, np.asarray(tokens)[:, :, None], 2)[:, :, 0]


def mean_over(values, chosen):
    """Mean over each sequence's chosen positions (0 if there are none), then over sequences."""
    return (values * mean_weights(chosen)).sum(1).mean()


def test_masked_diffusion(params, case):
    logits = forward(params, case.masked_inputs, case.batch.tokens_BT, problem=PROBLEM)
    entropy = cross_entropy(log_softmax(logits), case.batch.tokens_BT)
    chosen = case.supervised & np.asarray(case.masked)
    plain = run("mdlm", params, case)
    np.testing.assert_allclose(plain["loss"], mean_over(entropy, chosen), rtol=1e-5)
    right = np.asarray(logits.argmax(-1) == case.batch.tokens_BT)
    np.testing.assert_allclose(plain["accuracy"], right[chosen].mean(), rtol=1e-6)
    weighted = run("mdlm", params, case, inverse_rate_weight=True)
    by_row = (entropy * chosen).sum(1) / case.supervised.sum(1) / case.rate
    np.testing.assert_allclose(weighted["loss"], by_row.mean(), rtol=1e-5)


def test_certainty_forcing(params, case):
    logits = forward(params, case.masked_inputs, case.batch.tokens_BT, problem=PROBLEM)
    log_probs = log_softmax(logits)
    chosen = case.supervised & np.asarray(case.masked)
    right = chosen & np.asarray(logits.argmax(-1) == case.batch.tokens_BT)
    assert 0 < right.sum() < chosen.sum()
    certainty = mean_over(-(np.exp(log_probs) * log_probs).sum(-1), right)
    found = run("dparallel", params, case, certainty=0.7)
    expected = mean_over(cross_entropy(log_probs, case.batch.tokens_BT), chosen) + 0.7 * certainty
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["joint", "alternating"])
def test_certainty_forcing_of_oput_is_part_of_every_loss(params, case, schedule):
    """At the masked positions that this input's logits predict right; the other terms stay as they are."""
    chosen = case.supervised & np.asarray(case.masked)
    forced = run("oput", params, case, schedule=schedule, certainty=0.7)
    plain = run("oput", params, case, schedule=schedule)
    expected = {}
    for name, inputs in (("masked_loss", case.masked_inputs), ("predicted_loss", manual_rollout(params, case, 1))):
        log_probs = log_softmax(forward(params, inputs, case.batch.tokens_BT, problem=PROBLEM))
        right = chosen & (log_probs.argmax(-1) == np.asarray(case.batch.tokens_BT))
        by_row = (-(np.exp(log_probs) * log_probs).sum(-1) * mean_weights(right)).sum(1)
        on_policy = np.asarray(case.batch.on_policy_B) == (name == "predicted_loss")
        expected[name] = (by_row if schedule == "joint" else by_row[on_policy]).mean()
    for name, certainty in expected.items():
        assert certainty > 0
        np.testing.assert_allclose(forced[name], plain[name] + 0.7 * certainty, rtol=1e-5)


def test_uniform_diffusion(params, case):
    drawn = random_tokens(case.keys, LENGTH, SMALL.vocab_size)
    inputs = jnp.where(case.masked, drawn, case.batch.tokens_BT)
    logits = forward(params, inputs, case.batch.tokens_BT, problem=PROBLEM)
    entropy = cross_entropy(log_softmax(logits), case.batch.tokens_BT)
    np.testing.assert_allclose(run("uniform", params, case)["loss"], mean_over(entropy, case.supervised), rtol=1e-5)


def test_a_sequence_without_masks_costs_nothing(params, case):
    """Rather than a division by zero."""
    none = dataclasses.replace(case, masked=jnp.zeros_like(case.masked))
    assert run("mdlm", params, none)["loss"] == 0
    assert np.isfinite(run("dparallel", params, none, certainty=2.0)["loss"])


def test_noise_follows_from_key_and_batch(params, case):
    @jax.jit
    def loss(key):
        return objective_gradients(params, case.batch, key, make_problem(kind="mdlm")).metrics["loss"].value

    np.testing.assert_allclose(loss(KEY), run("mdlm", params, case)["loss"], rtol=1e-6)
    assert loss(jax.random.key(12)) != loss(KEY)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradients_are_float32_whatever_the_computation_is_in(params, case, kind):
    problem = make_problem("bfloat16", kind=kind, certainty=2.0 if kind in ("oput", "dparallel") else 0.0)
    found = jax.eval_shape(lambda p: objective_gradients(p, case.batch, KEY, problem), params)
    assert jax.tree.map(lambda leaf: leaf.shape, found.grads) == jax.tree.map(lambda leaf: leaf.shape, params)
    assert {leaf.dtype for leaf in jax.tree.leaves((found.grads, found.metrics))} == {jnp.dtype(jnp.float32)}


def test_bfloat16_gradients_point_where_those_of_float32_do(params, case):
    args = (params, case.masked_inputs, case.batch, case.weights, case.keys)
    (loss, _), grads = gradients(*args, problem=PROBLEM)
    (narrow_loss, _), narrow = gradients(*args, problem=make_problem("bfloat16"))
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, narrow))
    assert abs(narrow_loss / loss - 1) < 0.01
    assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
