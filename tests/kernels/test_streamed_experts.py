"""The kernels under Pallas's interpreter, which runs blocks, warpgroups and barriers and looks for races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.expert_choice import listed
from dmax_jax.kernels.routed_experts import ragged_experts
from dmax_jax.kernels.streamed_experts import can_stream, streamed_experts
from tests.kernels.test_routed_experts import draw

needs_interpreter = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")
D, F, E, X = 256, 128, 12, 3  # the smallest sizes with two tiles of output features


def single(tree, dtype):
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)


def interpreter():
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams(detect_races=True)


@needs_interpreter
@pytest.mark.parametrize("blocks", [2, 5])
@pytest.mark.parametrize(
    ("rows", "among"), [(1, None), (16, None), (20, [7]), (32, [0, 4, 11]), (64, None), (128, None)]
)
def test_the_kernels_equal_the_plain_function(rows, among, blocks):
    chosen = X if among is None else len(among)
    inputs = draw(rows, rows, D, F, E, chosen, among, shared_width=F)
    x, experts, shared = single((inputs[0], *inputs[2:]), jnp.bfloat16)
    choice = listed(single(inputs[1], jnp.float32))
    assert can_stream(x, experts, shared)
    found = streamed_experts(x, choice, experts, shared, blocks=blocks, interpret=interpreter())
    wide = single((x, experts, shared), jnp.float32)
    exact = ragged_experts(wide[0], choice, *wide[1:], experts_per_row=chosen)
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(found - exact) < 0.004 * np.linalg.norm(exact)  # bfloat16 between the two products


def test_shapes_that_the_kernels_are_not_made_for_are_refused():
    inputs = draw(0, 4, D, F, E, X, shared_width=F)
    x, experts, shared = single((inputs[0], *inputs[2:]), jnp.bfloat16)
    assert can_stream(x, experts, shared)
    assert not can_stream(*single((x, experts, shared), jnp.float32))
    assert not can_stream(jnp.zeros((129, D), jnp.bfloat16), experts, shared)
    assert not can_stream(x, experts, [shared[0][:64], shared[1][:64], shared[2][:, :64]])
    assert not can_stream(x[:, :64], [array[..., :64] for array in experts], shared)
