import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.expert_choice import choice_of
from dmax_jax.kernels.grouped_experts import grouped_experts, tile_rows
from dmax_jax.kernels.grouped_products import Order, places_of_all, tile_hidden, tile_outputs
from dmax_jax.kernels.quantised_weight import KINDS, dequantise, quantise
from dmax_jax.kernels.routed_experts import ragged_experts
from dmax_jax.kernels.row_groups import Tiles
from tests.kernels.interpreter import interpreted, needs_interpreter
from tests.kernels.test_routed_experts import draw

D, F = 256, 128


def single(tree, dtype):
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), tree)


@needs_interpreter
@pytest.mark.parametrize("blocks", [2, 7])
@pytest.mark.parametrize(
    ("rows", "experts", "per_row", "chosen", "among", "shared_width"),
    [
        (40, 12, 3, 3, None, F),  # tiles of 16
        (50, 6, 3, 3, [0, 2, 5], F),  # tiles of 48, experts with every row and with none
        (70, 3, 2, 2, None, F),  # tiles of 80
        (20, 12, 4, 2, None, 64),  # fewer experts than a row may have
        (32, 12, 2, 0, None, F),  # none at all
    ],
)
def test_the_kernels_equal_the_plain_function(rows, experts, per_row, chosen, among, shared_width, blocks):
    x, weights, routed, shared = draw(rows, rows, D, F, experts, chosen, among, shared_width=shared_width)
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
    x, weights, routed, shared = draw(rows, rows, D, F, experts, per_row, None, shared_width=F)
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
    tiles = Tiles(jnp.array([0, 1, 1, 0]), jnp.array([1, 3]))  # the fourth tile is none
    how = {"blocks": 5}
    hidden = interpreted(tile_hidden, None, x, [(gate, None), (up, None)], tiles, weights, **how)
    wide, of = jnp.float32, tiles.ids_T[:3]
    gated, raised = (jnp.einsum("trd,tfd->trf", x[:3].astype(wide), m[of].astype(wide)) for m in (gate, up))
    exact = jax.nn.silu(gated) * raised * weights[:48].reshape(3, 16, 1)
    assert np.linalg.norm(hidden[:3] - exact) < 0.004 * np.linalg.norm(exact)
    found = interpreted(tile_outputs, hidden, (down, None), tiles, routed_tiles=4, **how)
    exact = jnp.einsum("trf,tdf->trd", hidden[:3].astype(wide), down[of].astype(wide))
    assert np.linalg.norm(found[:3] - exact) < 0.004 * np.linalg.norm(exact)


@pytest.mark.parametrize(("routed", "shared"), [(0, 3), (20, 3), (7, 0)])
def test_every_tile_has_its_turn(routed, shared):
    order = Order(Tiles(jnp.zeros(30, int), jnp.array([routed])), 30, shared, 4)
    found = [order.find(jnp.int32(place)) for place in range(routed + shared)]
    assert int(order.count) == len(found)
    numbers = {kind: [int(f.number) for f in found if bool(f.is_shared) == kind] for kind in (False, True)}
    assert numbers == {False: list(range(routed)), True: list(range(shared))}
    assert [int(f.stands) for f in found if f.is_shared] == [30 + number for number in range(shared)]


@pytest.mark.parametrize("rows", [48, 50, 16])
def test_where_the_shared_expert_leaves_the_rows(rows):
    starts = [min(first, rows - 16) for first in range(0, rows, 16)]
    standing = np.concatenate([np.arange(start, start + 16) for start in starts])
    np.testing.assert_array_equal(standing[places_of_all(rows, 16, 3) - 48], np.arange(rows))
