import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.decoding.generate import Generation
from dmax_jax.errors import InputError
from dmax_jax.measuring import decoding
from dmax_jax.measuring.decoding import (
    DecodeProblem,
    compile_decoding,
    mean_active_experts,
    required_bytes,
    time_decoding,
)
from dmax_jax.measuring.weights import route_uniformly
from dmax_jax.model.quantisation import quantise_params
from dmax_jax.model.router import route
from tests.models import SMALL, small_model, small_params

PROBLEM = DecodeProblem(batch_size=2, block_length=4, context=8, blocks=3, steps_per_block=2, repeats=2)


def with_bias(bias):
    """The small model whose sparse layers all have this bias of the choice of experts."""
    params = small_params()
    layers = [
        layer.replace(mlp=layer.mlp.replace(expert_bias=jnp.asarray(bias))) if hasattr(layer.mlp, "experts") else layer
        for layer in params.layers
    ]
    return params.replace(layers=tuple(layers))


def test_every_block_takes_the_number_of_forwards_that_was_asked_for():
    run = compile_decoding(small_params(), SMALL, PROBLEM)
    for blocks in (1, 4):
        generation = run(blocks)
        assert generation.forwards_B.tolist() == [2 * blocks] * 2
        assert generation.total_B.tolist() == [8 + 4 * blocks] * 2
        assert (generation.tokens_BT[:, : 8 + 4 * blocks] != SMALL.mask_token_id).all()


def test_active_experts_are_those_that_some_position_chose():
    everyone_takes_two = with_bias([9.0, 9.0, 0, 0, 0, 0])
    assert mean_active_experts(everyone_takes_two, SMALL, PROBLEM) == [2.0]
    spread = route_uniformly(small_params(), 64, jax.random.key(0))
    moe = spread.layers[1].mlp
    chosen_ME = np.asarray(route(jnp.zeros((16, SMALL.hidden_size)), moe.router, moe.expert_bias, SMALL).weights_ME) > 0
    block, with_the_one_before = chosen_ME[:8].any(0).sum(), chosen_ME.any(0).sum()
    assert block < with_the_one_before
    assert mean_active_experts(spread, SMALL, PROBLEM) == [(block + with_the_one_before) / 2]


def test_required_bytes_by_hand():
    D, V, F, E = 32, 48, 16, 6
    params = small_params()
    needed = required_bytes(params, SMALL, PROBLEM, [2.5])
    assert needed.experts == 2.5 * 3 * D * F * 4
    assert needed.head == V * D * 4
    attention = (4 + 2 * 2) * 8 * D + D * 4 * 8 + 2 * 8
    dense, sparse = 3 * D * 48, E * D + E + 3 * D * F
    assert needed.other_weights == 4 * (2 * (attention + 2 * D) + dense + sparse + D)
    # Two layers, two rows; timed blocks start at 12, 16 and 20.
    assert needed.cache == 2 * 2 * 16 * (2 * 2 * 8 * 4)
    assert needed.total == needed.experts + needed.head + needed.other_weights + needed.cache


def test_required_bytes_of_8_bit_weights_by_hand():
    D, V, F, E, dense, heads = 32, 48, 16, 6, 48, 4 * 8
    needed = required_bytes(quantise_params(small_params(), SMALL, "int8"), SMALL, PROBLEM, [2.5])
    assert needed.experts == 2.5 * (3 * D * F + 4 * (2 * F + D))
    assert needed.head == V * D + 4 * V
    qkv = 2 * heads
    attention = qkv * D + 4 * qkv + D * heads + 4 * D + 4 * 2 * 8
    mlps = 3 * D * dense + 4 * (2 * dense + D) + 3 * D * F + 4 * (2 * F + D)
    assert needed.other_weights == 2 * (attention + 4 * 2 * D) + mlps + 4 * (E * D + E + D)
    assert needed.cache == required_bytes(small_params(), SMALL, PROBLEM, [2.5]).cache


@pytest.mark.parametrize("drift", [0, 1])
def test_a_forward_is_what_more_blocks_take_and_the_rest_is_the_prefill(monkeypatch, drift):
    clock = [0.0]

    def run(blocks):
        last = clock[0] > 100
        clock[0] += 10 + 3 * blocks * PROBLEM.steps_per_block
        tokens_BT = np.full((2, 8), blocks + drift * last)
        return Generation(tokens_BT, total_B=None, forwards_B=None, trace=None, active_experts=None)

    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(decoding, "compile_decoding", lambda *_: run)
    monkeypatch.setattr(decoding, "mean_active_experts", lambda *_: [])
    times = time_decoding(small_params(), SMALL, PROBLEM)
    assert (times.ms_per_forward, times.slowest_ms_per_forward, times.prefill_ms) == (3000, 3000, 10000)
    assert times.same_tokens == (not drift)


def test_a_model_without_experts_is_measured_too():
    dense = small_model(first_k_dense_replace=2)
    params = small_params().replace(layers=small_params().layers[:1] * 2)
    times = time_decoding(params, dense, PROBLEM)
    assert times.active_experts == []
    assert times.compile_seconds > 0
    assert required_bytes(params, dense, PROBLEM, []).experts == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "blocks=0 must be at least 1"),
        ({"steps_per_block": 5}, "a block of 4 has at most as many forwards"),
        ({"context": 10}, "context=10 is no multiple of block_length=4"),
    ],
)
def test_senseless_problems_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PROBLEM, **changes)
