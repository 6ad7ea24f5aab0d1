import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels import streamed_experts as streamed_experts_module
from dmax_jax.kernels.expert_choice import choice_of
from dmax_jax.kernels.quantised_weight import KINDS, dequantise, quantise
from dmax_jax.kernels.routed_experts import ragged_experts
from dmax_jax.kernels.streamed_experts import Deal, can_stream, streamed_experts
from tests.kernels.interpreter import interpreted, needs_interpreter
from tests.kernels.test_routed_experts import draw

D, F, E, X = 256, 128, 12, 3  # the smallest sizes with two tiles of output features


def single(tree, dtype):
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)


def inputs_of(rows: int, among=None, chosen=X):
    x, weights, experts, shared = draw(rows, rows, D, F, E, chosen, among, shared_width=F)
    return *single((x, experts, shared), jnp.bfloat16), choice_of(single(weights, jnp.float32))


def rounded(matrices, kind):
    """The matrices in 8 bits with scales that differ much, and what they stand for."""
    small = [quantise(matrix, kind) for matrix in matrices]
    factors = [(1 + jnp.arange(matrix.scale.size).reshape(matrix.scale.shape) % 7) / 4 for matrix in small]
    small = [matrix.replace(scale=matrix.scale * factor) for matrix, factor in zip(small, factors, strict=True)]
    return small, [dequantise(matrix, jnp.float32) for matrix in small]


def check(rows, among, blocks, chosen=X, kind=None):
    x, experts, shared, choice = inputs_of(rows, among, chosen)
    wide = single((x, experts, shared), jnp.float32)
    if kind:
        (experts, wide_experts), (shared, wide_shared) = rounded(experts, kind), rounded(shared, kind)
        wide = wide[0], wide_experts, wide_shared
    assert can_stream(x, experts, shared)
    found = interpreted(streamed_experts, x, choice, experts, shared, blocks=blocks).sum(axis=0)
    exact = ragged_experts(wide[0], choice, *wide[1:], experts_per_row=max(chosen, 1))
    assert np.linalg.norm(found - exact) < 0.004 * np.linalg.norm(exact)  # bfloat16 between the two products
    return choice


@needs_interpreter
@pytest.mark.parametrize("blocks", [2, 5])
@pytest.mark.parametrize(("rows", "among"), [(1, None), (20, [7, 8, 9]), (32, [0, 4, 11]), (64, None)])
def test_the_kernels_equal_the_plain_function(rows, among, blocks):
    check(rows, among, blocks)


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [2, 5])
@pytest.mark.parametrize(("rows", "among"), [(1, None), (32, [0, 4, 11]), (64, None)])
def test_weights_of_eight_bits_times_their_scales_are_what_multiplies(rows, among, blocks, kind):
    check(rows, among, blocks, kind=kind)


@needs_interpreter
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("chosen", [0, 1, E])
def test_no_expert_one_and_all_with_more_blocks_than_there_is_work(chosen, kind):
    choice = check(16, None if chosen == E else [5], blocks=7, chosen=chosen, kind=kind)
    assert (choice.weights_ME > 0).any(axis=0).sum() == chosen


@needs_interpreter
def test_experts_in_many_groups_of_two_and_two_stages_of_a_product_with_down(monkeypatch):
    monkeypatch.setattr(streamed_experts_module, "GROUP", 2)
    monkeypatch.setitem(globals(), "F", 512)
    streamed_experts_module.expert_sums.clear_cache()
    check(20, None, blocks=5, kind="int8")
    streamed_experts_module.expert_sums.clear_cache()


@needs_interpreter
def test_too_few_blocks_are_refused():
    x, experts, shared, choice = inputs_of(4)
    with pytest.raises(ValueError, match="blocks=1"):
        streamed_experts(x, choice, experts, shared, blocks=1)


@pytest.mark.parametrize("active", [1, 2, 9, 20, 41, 164, 257])
@pytest.mark.parametrize(("blocks", "features"), [(132, 16), (128, 16), (5, 2), (2, 2), (9, 3)])
def test_every_expert_is_dealt_to_one_block_of_each_tile_of_features(active, blocks, features):
    tiles, extra = 8, 4
    block_B = jnp.arange(blocks)
    deal = Deal(jnp.int32(active), tiles, blocks, features, extra, block_B)
    listed_AB = np.asarray(jax.vmap(deal.listed)(jnp.arange(active)))
    dealt_AB = np.arange(active)[:, None] < np.asarray(deal.items)
    read_B = -(-(active * tiles - np.arange(blocks)) // blocks) * extra + np.asarray(deal.items)
    for feature in range(features):
        parts = np.arange(feature, blocks // features * features, features)
        assert sorted(listed_AB[:, parts][dealt_AB[:, parts]].tolist()) == list(range(active))
        if active >= extra * len(parts):
            assert np.ptp(read_B[parts]) <= 1  # as even as whole experts allow
    assert not dealt_AB[:, blocks // features * features :].any()


def test_shapes_that_the_kernels_are_not_made_for_are_refused():
    x, experts, shared, _ = inputs_of(4)
    assert can_stream(x, experts, shared)
    assert not can_stream(*single((x, experts, shared), jnp.float32))
    assert not can_stream(jnp.zeros((65, D), jnp.bfloat16), experts, shared)
    assert not can_stream(x, experts, [shared[0][:64], shared[1][:64], shared[2][:, :64]])
    assert not can_stream(x[:, :64], [array[..., :64] for array in experts], shared)
    int8, fp8 = ([rounded(matrices, kind)[0] for matrices in (experts, shared)] for kind in KINDS)
    assert can_stream(x, *int8)
    assert can_stream(x, *fp8)
    assert not can_stream(x, int8[0], fp8[1])
