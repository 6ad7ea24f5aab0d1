"""Whole generations: with and without a cache, alone and in batches, on one device and on several."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.decoding import generate as generate_module
from dmax_jax.decoding.batch import DecodeSettings, decode_prompts
from dmax_jax.decoding.block import enter_block
from dmax_jax.decoding.generate import STEPS, embed_block, generate_for, read_logits
from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, SpdPolicy, ThresholdPolicy
from dmax_jax.decoding_flags import parse_mesh
from dmax_jax.model.masks import block_causal_mask
from dmax_jax.model.params import cast_params, param_shardings
from dmax_jax.model.quantisation import quantise_params
from dmax_jax.model.transformer import transformer, unembed
from dmax_jax.sharding import DECODE, make_mesh
from tests.models import SMALL, small_params

WIDTH, GEN_LENGTH = 4, 13
MASK = SMALL.mask_token_id
SETTINGS = DecodeSettings(gen_length=GEN_LENGTH, block_length=WIDTH, batch_size=3, seed=5, trace=True, eos_id=13)
# One prompt of each batch of three is longer than two blocks; the last batch has a row of padding.
PROMPTS = [np.random.default_rng(n).integers(0, 44, n).tolist() for n in (10, 3, 8, 1, 11, 5, 9, 2)]
POLICIES = {
    "spd": SpdPolicy(threshold=0.3, accept_threshold=0.6),
    "threshold": ThresholdPolicy(threshold=0.5),
    "hierarchical": HierarchicalPolicy(threshold=0.5, low_threshold=0.1),
    "credit": CreditPolicy(threshold=0.5),
    "sampled spd": SpdPolicy(threshold=0.1, accept_threshold=0.4, temperature=0.7),
}


@pytest.fixture(scope="module")
def params():
    return small_params()


def decode(params, policy, prompts=PROMPTS, **changes):
    return list(decode_prompts(params, SMALL, prompts, policy, dataclasses.replace(SETTINGS, **changes)))


@pytest.fixture(scope="module")
def batched(params):
    """The answers to all prompts by method, in batches of three."""
    return {name: decode(params, policy) for name, policy in POLICIES.items()}


@jax.jit
def recomputed_logits(params, x_TD, start):
    """Logits [1, W, V] of the block at `start`, from all positions at once."""
    T = x_TD.shape[0]
    out = transformer(params, x_TD[None], jnp.arange(T)[None], block_causal_mask(T, WIDTH), SMALL)
    return unembed(params, jax.lax.dynamic_slice_in_dim(out.hidden_BTD, start, WIDTH, axis=1))


@jax.jit
def one_step(block, logits_BWV, key, forward, policy):
    block, prediction = read_logits(block, logits_BWV, jax.random.fold_in(key, forward)[None], policy, MASK)
    return STEPS[type(policy)](block, prediction, policy, MASK)


embed_alone = jax.jit(embed_block)


def decode_without_cache(params, prompt, policy, key, eos_id):
    """The whole algorithm for one prompt as plain Python: tokens, forwards and trace."""
    total = -(-(len(prompt) + GEN_LENGTH) // WIDTH) * WIDTH
    table = np.asarray(params.embed)
    tokens = np.full(28, MASK, np.int32)  # one length for all prompts; later blocks are invisible
    tokens[: len(prompt)] = prompt
    forwards, trace = 0, []
    for start in range(len(prompt) // WIDTH * WIDTH, total, WIDTH):
        own = slice(start, start + WIDTH)
        credit = np.zeros((1, WIDTH, SMALL.vocab_size), np.float32) if isinstance(policy, CreditPolicy) else None
        block = enter_block(tokens[None, own], MASK, credit)
        for step in range(WIDTH):
            x_TD = table[tokens]
            x_TD[own] = embed_alone(params, block, policy, MASK)[0]
            logits = recomputed_logits(params, x_TD, start)
            block, stopped = one_step(block, logits, key, forwards, policy)
            forwards += 1
            decoded = np.array(block.tokens_BW[0])
            leaves = bool(stopped[0]) or step == WIDTH - 1
            if leaves:
                others = np.array(logits[0])
                others[:, MASK] = -np.inf
                decoded = np.where(decoded == MASK, others.argmax(-1), decoded)
            trace.append((start // WIDTH, step, decoded.tolist(), bool(stopped[0])))
            if leaves:
                break
        tokens[own] = decoded
        if eos_id in decoded[max(len(prompt) - start, 0) :]:
            tokens[start + WIDTH :] = eos_id
            break
    return tokens[len(prompt) : total].tolist(), forwards, trace


@pytest.mark.parametrize("method", POLICIES)
def test_only_soft_decoding_feeds_soft_embeddings(params, method):
    tokens_BW, unsure_BW = jnp.array([[3, MASK, 5, 7]]), jnp.full((1, WIDTH), 0.5)
    block = enter_block(jnp.full((1, WIDTH), MASK), MASK).replace(tokens_BW=tokens_BW, confidence_BW=unsure_BW)
    is_hard_BW = (embed_alone(params, block, POLICIES[method], MASK) == params.embed[tokens_BW]).all(-1)
    soft = "spd" in method
    assert is_hard_BW.tolist() == [[not soft, True, not soft, not soft]]


def outcome(answer):
    trace = [(step.block, step.step, step.token_ids, step.stop) for step in answer.trace]
    return answer.token_ids, answer.forwards, trace


@pytest.mark.parametrize("method", POLICIES)
def test_cache_and_batch_change_nothing(params, batched, method):
    for index, (prompt, answer) in enumerate(zip(PROMPTS, batched[method], strict=True)):
        key = jax.random.fold_in(jax.random.key(SETTINGS.seed), index)
        expected = decode_without_cache(params, prompt, POLICIES[method], key, SETTINGS.eos_id)
        assert outcome(answer) == expected, prompt
        assert answer.prompt_ids == prompt


def test_the_cases_are_worth_comparing(batched):
    """Rows end early and late, blocks stop early and late, and the methods differ."""
    for method, answers in batched.items():
        ended = [answer.generated_tokens < len(answer.token_ids) for answer in answers]
        assert 1 < sum(ended) < len(answers), method
        lengths = {len(block) for answer in answers for block in blocks_of(answer)}
        assert {min(lengths) < WIDTH, max(lengths) == WIDTH} == {True}, method
    assert len({tuple(answer.forwards for answer in answers) for answers in batched.values()}) == len(POLICIES)


def blocks_of(answer) -> list[list]:
    return [list(steps) for _, steps in itertools.groupby(answer.trace, key=lambda step: step.block)]


@pytest.mark.parametrize("order", [[7, 6, 5, 4, 3, 2, 1, 0], [2, 1, 3, 4, 7, 5, 0, 6]])
def test_the_order_of_prompts_changes_nothing(params, batched, order):
    answers = decode(params, POLICIES["spd"], [PROMPTS[index] for index in order])
    assert [outcome(answer) for answer in answers] == [outcome(batched["spd"][index]) for index in order]


@pytest.mark.parametrize(("batch_size", "prompts"), [(1, [1, 3, 7]), (8, range(8))])
def test_the_size_of_a_batch_changes_nothing(params, batched, batch_size, prompts):
    answers = decode(params, POLICIES["spd"], [PROMPTS[index] for index in prompts], batch_size=batch_size)
    assert [outcome(answer) for answer in answers] == [outcome(batched["spd"][index]) for index in prompts]


@pytest.mark.parametrize(("devices", "method"), [(2, "spd"), *[(4, method) for method in POLICIES]])
def test_devices_that_share_the_model_give_the_same_tokens(params, batched, devices, method):
    """On 4 of them, pairs have the same one of the two key heads."""
    answers = decode(share(params, devices), POLICIES[method])
    assert [outcome(answer) for answer in answers] == [outcome(answer) for answer in batched[method]]


def test_shared_8_bit_weights_give_the_same_tokens(params):
    quantised = quantise_params(params, SMALL, "int8")
    shared = quantise_params(share(params, 2), SMALL, "int8")
    assert shared.layers[1].mlp.experts.down.values.sharding.shard_shape((6, 32, 16)) == (6, 32, 8)
    expected = [outcome(answer) for answer in decode(quantised, POLICIES["spd"])]
    assert [outcome(answer) for answer in decode(shared, POLICIES["spd"])] == expected


def test_a_listener_hears_each_block_once(params):
    heard = {1: [], 2: []}
    for devices, blocks in heard.items():
        note = functools.partial(lambda blocks, *told: blocks.append(told), blocks)
        list(decode_prompts(share(params, devices), SMALL, PROMPTS[:3], POLICIES["spd"], SETTINGS, on_block=note))
    assert sorted(heard[1]) == sorted(heard[2]) != []


def share(params, devices):
    mesh = make_mesh(parse_mesh(f"tensor:{devices}"))
    return jax.device_put(params, param_shardings(SMALL, mesh, DECODE))


def test_a_draw_depends_on_seed_and_index_and_not_on_neighbours(params, batched):
    policy, expected = POLICIES["sampled spd"], [outcome(answer) for answer in batched["sampled spd"]]
    assert [outcome(answer) for answer in decode(params, policy, PROMPTS[:3])] == expected[:3]
    others = [PROMPTS[4], PROMPTS[1], PROMPTS[6]]
    assert outcome(decode(params, policy, others)[1]) == expected[1]
    elsewhere = decode(params, policy, [PROMPTS[0]] * 3)
    assert outcome(elsewhere[0]) == expected[0]
    assert len({tuple(answer.token_ids) for answer in elsewhere}) == 3  # one prompt, three draws
    assert decode(params, policy, PROMPTS[:3], seed=6)[0].token_ids != expected[0][0]


def test_bfloat16_weights_decode_and_neighbours_change_nothing(params):
    narrow = cast_params(params, jnp.bfloat16)
    expected = [outcome(answer) for answer in decode(narrow, POLICIES["spd"], PROMPTS[:3])]
    reversed_order = [outcome(answer) for answer in decode(narrow, POLICIES["spd"], PROMPTS[2::-1])]
    assert reversed_order[::-1] == expected
    assert all(MASK not in tokens for tokens, _, _ in expected)


@pytest.mark.parametrize("name", ["spd", "threshold"])
def test_a_block_gets_no_more_forwards_than_allowed_and_no_mask_stays(params, name):
    slow = POLICIES[name].replace(threshold=1.0)
    answers, limited = decode(params, slow), decode(params, slow.replace(max_steps=2))
    assert max(step.step for answer in answers for step in answer.trace) == WIDTH - 1
    assert {step.step for answer in limited for step in answer.trace} == {0, 1}
    assert all(MASK not in answer.token_ids for answer in limited)
    unlimited = decode(params, slow.replace(max_steps=WIDTH + 5))
    assert [answer.token_ids for answer in unlimited] == [answer.token_ids for answer in answers]


@pytest.mark.parametrize(
    ("rows", "dtype", "devices", "early"),
    [(2, "bfloat16", 1, True), (3, "bfloat16", 1, False), (2, "float32", 1, False), (2, "bfloat16", 2, False)],
)
def test_when_kernels_start_early_and_stay_out_of_graphs(params, monkeypatch, rows, dtype, devices, early):
    asked = []
    monkeypatch.setattr(jax, "jit", lambda function, **settings: asked.append((function, settings)) or function)
    monkeypatch.setattr(generate_module, "has_hopper", lambda: True)
    monkeypatch.setattr(generate_module, "_compiled", generate_module._compiled.__wrapped__)
    placed = param_shardings(SMALL, make_mesh(parse_mesh(f"tensor:{devices}")), DECODE)
    generate_for(jax.device_put(cast_params(params, dtype), placed), rows, 32, deterministic=True)
    function, options = asked[-1][0], asked[-1][1]["compiler_options"]
    assert options["xla_gpu_deterministic_ops"]
    assert function.keywords["overlap"] == early
    assert ("CUSTOM_CALL" not in options.get("xla_gpu_enable_command_buffer", "CUSTOM_CALL")) == early
