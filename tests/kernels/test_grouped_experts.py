import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.expert_choice import choice_of
from dmax_jax.kernels.grouped_experts import grouped_experts, tile_rows
from dmax_jax.kernels.grouped_products import tile_hidden, tile_outputs
from dmax_jax.kernels.quantised_weight import KINDS, dequantise, quantise
from dmax_jax.kernels.routed_experts import ragged_experts
from tests.kernels.interpreter import interpreted, needs_interpreter
from tests.kernels.test_routed_experts import draw

D, F = 256, 128


def single(tree, dtype):
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)


@needs_interpreter
@pytest.mark.parametrize("blocks", [2, 7])
@pytest.mark.parametrize(
    ("rows", "experts", "per_row", "chosen", "among"),
    [
        (40, 12, 3, 3, None),  # tiles of 16
        (50, 6, 3, 3, [0, 2, 5]),  # tiles of 48, experts with every row and with none
        (70, 3, 2, 2, None),  # tiles of 80
        (20, 12, 4, 2, None),  # fewer experts than a row may have
    ],
)
def test_the_kernels_equal_the_plain_function(rows, experts, per_row, chosen, among, blocks):
    x, weights, routed, shared = draw(rows, rows, D, F, experts, chosen, among, shared_width=64)
    choice = choice_of(single(weights, jnp.float32))
    given = single((x, routed, shared), jnp.bfloat16)
    found = interpreted(grouped_experts, given[0], choice, *given[1:], experts_per_row=per_row, blocks=blocks)
    wide = single(given, jnp.float32)
    exact = ragged_experts(wide[0], choice, *wide[1:], experts_per_row=per_row)
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(found - exact) < 0.006 * np.linalg.norm(exact)  # bfloat16 before the sum over experts


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "experts", "per_row"), [(40, 12, 3), (50, 6, 3), (70, 3, 2)])  # tiles of 16, 48, 80
def test_weights_of_eight_bits_times_their_scales_are_what_multiplies(rows, experts, per_row, kind):
    x, weights, routed, shared = draw(rows, rows, D, F, experts, per_row, None, shared_width=64)
    choice = choice_of(single(weights, jnp.float32))
    x = jnp.asarray(x, jnp.bfloat16)
    factors = [1 + np.arange(matrix.shape[1])[:, None] % 5 for matrix in routed]  # scales differ much
    routed = [quantise(jnp.asarray(matrix * factor), kind) for matrix, factor in zip(routed, factors, strict=True)]
    shared = [quantise(jnp.asarray(matrix), kind) for matrix in shared]
    found = interpreted(grouped_experts, x, choice, routed, shared, experts_per_row=per_row, blocks=5)
    wide = [[dequantise(matrix, jnp.float32) for matrix in matrices] for matrices in (routed, shared)]
    exact = ragged_experts(x.astype(jnp.float32), choice, *wide, experts_per_row=per_row)
    assert np.linalg.norm(found - exact) < 0.005 * np.linalg.norm(exact)


def test_tiles_have_room_for_most_experts():
    assert [tile_rows(pairs, 256) for pairs in (8, 256, 2048, 4096, 8192, 10**6)] == [16, 16, 16, 32, 48, 128]


@needs_interpreter
def test_the_kernels_alone_have_no_races_either():
    def draw_bf16(seed, *shape):
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)

    x, gate, up, down = draw_bf16(0, 4, 16, D), draw_bf16(1, 2, F, D), draw_bf16(2, 2, F, D), draw_bf16(3, 2, D, F)
    weights = jnp.linspace(0.5, 2, 64, dtype=jnp.float32)
    ids, upto = jnp.array([0, 1, 1, 0]), jnp.array([1, 3])  # the fourth tile is none
    hidden = interpreted(tile_hidden, x, (gate, up), ids, upto, weights, blocks=5)
    wide, of = jnp.float32, ids[:3]
    gated, raised = (jnp.einsum("trd,tfd->trf", x[:3].astype(wide), m[of].astype(wide)) for m in (gate, up))
    exact = jax.nn.silu(gated) * raised * weights[:48].reshape(3, 16, 1)
    assert np.linalg.norm(hidden[:3] - exact) < 0.004 * np.linalg.norm(exact)
    found = interpreted(tile_outputs, hidden, down, ids, upto, blocks=5)
    exact = jnp.einsum("trf,tdf->trd", hidden[:3].astype(wide), down[of].astype(wide))
    assert np.linalg.norm(found[:3] - exact) < 0.004 * np.linalg.norm(exact)
