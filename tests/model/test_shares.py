"""What each device computes of a model that several share. Whole generations: tests/decoding/test_generate.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dmax_jax.config import MeshConfig
from dmax_jax.decoding.prediction import predict
from dmax_jax.kernels import hopper
from dmax_jax.kernels.device_sums import Inbox
from dmax_jax.kernels.expert_choice import choose_by_counting, choose_by_ranks
from dmax_jax.kernels.residual_norm import MAX_ROWS, add_and_norm_over
from dmax_jax.model import shares as module
from dmax_jax.model.masks import block_causal_mask
from dmax_jax.model.shares import AXIS, run_on_shares, shares
from dmax_jax.model.transformer import embed, transformer, unembed
from dmax_jax.sharding import make_mesh
from tests.kernels.interpreter import interpreted, needs_interpreter
from tests.models import SMALL, random_params, small_model

MANY_EXPERTS = small_model(num_experts=12)  # beyond those that are multiplied with every row
TOKENS_BT = np.random.default_rng(0).integers(0, 44, (2, 8))


def mesh_of_parts(parts: int):
    return make_mesh(MeshConfig(data=1, tensor=parts))


def predictions(params, config, tokens_BT, keys_B, temperature):
    """The tokens that come out, their probability, and the best tokens but the mask."""
    positions = jnp.arange(tokens_BT.shape[1])[None]
    out = transformer(params, embed(params, tokens_BT), positions, block_causal_mask(len(positions[0]), 4), config)
    logits_BWV = unembed(params, out.hidden_BTD)
    assert logits_BWV.shape[-1] * shares() == config.vocab_size
    assert out.kv[0].k_BSKH.shape[2] == max(1, 2 // shares())
    prediction = predict(logits_BWV, config.mask_token_id, temperature, keys_B)
    return prediction.tokens_BW, prediction.confidence_BW, prediction.others_BW


@pytest.mark.parametrize(("config", "temperature"), [(SMALL, 0.0), (MANY_EXPERTS, 0.8)])
def test_parts_make_up_the_whole(config, temperature):
    params, keys_B = random_params(config), jax.random.split(jax.random.key(1), 2)
    run = functools.partial(predictions, temperature=temperature)
    tokens_BT, confidence_BT, others_BT = jax.jit(run, static_argnums=1)(params, config, TOKENS_BT, keys_B)
    for parts in (1, 2, 4):
        shared = jax.jit(functools.partial(run_on_shares, run), static_argnums=(1, 2))
        found_BT, found_confidence_BT, found_others_BT = shared(params, config, mesh_of_parts(parts), TOKENS_BT, keys_B)
        np.testing.assert_array_equal(found_BT, tokens_BT)
        np.testing.assert_array_equal(found_others_BT, others_BT)
        np.testing.assert_allclose(found_confidence_BT, confidence_BT, rtol=2e-5)


def test_every_sum_over_shares_has_the_inbox_of_the_device(monkeypatch):
    sums = []

    def by_all_reduce(axis, inbox, *rest, **digits):
        sums.append(inbox)
        return add_and_norm_over(axis, None, *rest, **digits)

    def open_inbox(axis, rows, width):
        return Inbox(*[jnp.full((rows,), width)] * 3)

    for name, stand_in in (("is_hopper", lambda: True), ("can_norm", lambda *_: True), ("open_inbox", open_inbox)):
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(module, "add_and_norm_over", by_all_reduce)
    run = functools.partial(predictions, temperature=0.0)
    arguments = random_params(SMALL), SMALL, mesh_of_parts(2), TOKENS_BT, jax.random.split(jax.random.key(1), 2)
    jax.jit(functools.partial(run_on_shares, run), static_argnums=(1, 2)).lower(*arguments)
    assert len(sums) == 2 * SMALL.num_hidden_layers
    assert all(inbox.words.shape == (MAX_ROWS,) for inbox in sums)


def test_kernels_run_where_a_device_works_by_itself(monkeypatch):
    monkeypatch.setattr(hopper, "has_hopper", lambda: True)
    mesh, found = make_mesh(MeshConfig(data=2, tensor=2)), {}

    def note(name, x):
        found[name] = hopper.is_hopper()
        return x

    def over(name, axes):
        whole = PartitionSpec()
        run = functools.partial(note, name)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=whole, out_specs=whole, axis_names=axes, check_vma=False))

    jax.jit(functools.partial(note, "compiler"))(1.0)
    over("devices", {"data", "expert", "tensor"})(1.0)
    over("compiler within a part", {"tensor"}).lower(1.0)
    assert found == {"compiler": False, "devices": True, "compiler within a part": False}
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert hopper.is_hopper()


@needs_interpreter
def test_a_kernel_runs_on_a_mesh():
    """Of one device: with more, the interpreter of jax 0.11 takes one device's barriers for another's."""
    scores_ME = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (3, 64)))
    settings = {"groups": 8, "kept_groups": 4, "experts_per_row": 4, "scale": 2.5}

    def on_mesh(scores_ME, interpret):
        kernel = functools.partial(choose_by_counting, **settings, interpret=interpret)
        whole, mesh = PartitionSpec(), mesh_of_parts(1)
        run = jax.shard_map(kernel, mesh=mesh, in_specs=(whole, whole), out_specs=whole, check_vma=False)
        return jax.jit(run)(scores_ME, scores_ME).weights_ME

    expected = choose_by_ranks(scores_ME, scores_ME, **settings).weights_ME
    np.testing.assert_allclose(interpreted(on_mesh, scores_ME), expected, atol=1e-6)


def test_axes_of_the_mesh_that_decoding_does_not_use_repeat_the_work():
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", AXIS), axis_types=(AxisType.Auto,) * 3)
    params = random_params(SMALL)
    run = functools.partial(predictions, temperature=0.0)
    keys_B = jax.random.split(jax.random.key(1), 2)
    expected, *_ = jax.jit(run, static_argnums=1)(params, SMALL, TOKENS_BT, keys_B)
    shared = jax.jit(functools.partial(run_on_shares, run), static_argnums=(1, 2))
    np.testing.assert_array_equal(shared(params, SMALL, mesh, TOKENS_BT, keys_B)[0], expected)
