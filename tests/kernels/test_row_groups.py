import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.kernels.expert_choice import choice_of
from dmax_jax.kernels.row_groups import count_rows, group_rows
from tests.kernels.interpreter import interpreted, needs_interpreter

TILE = 16


def draw(rows, experts, chosen, seed=0):
    """Distinct rows [M, 256], and weights [M, E] above 0 in `chosen` experts of each, the last of which all choose."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((rows, experts), np.float32)
    for row in range(rows):
        own = rng.choice(experts - 1, max(chosen - 1, 0), replace=False)
        weights[row, own] = rng.uniform(0.1, 2, len(own))
    weights[:, -1] = np.linspace(1, 2, rows) * (chosen > 0)
    return jnp.asarray(rng.normal(size=(rows, 256)), jnp.bfloat16), weights


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "experts", "chosen", "per_row"),
    [(1, 4, 1, 1), (33, 8, 2, 2), (20, 160, 3, 4), (150, 3, 2, 2), (5, 3, 0, 1)],
)
def test_every_row_is_copied_to_a_place_of_its_own_in_a_tile_of_its_expert(rows, experts, chosen, per_row):
    x, weights = draw(rows, experts, chosen)
    choice = choice_of(jnp.asarray(weights))
    groups = interpreted(group_rows, x, choice, TILE, experts_per_row=per_row)
    counts = (weights > 0).sum(axis=0)
    upto = np.cumsum(-(-counts // TILE))
    assert groups.tiles.upto_E[:experts].tolist() == upto.tolist()
    assert groups.tiles.upto_E[-1] == upto[-1]
    assert groups.tiles.ids_T[: upto[-1]].tolist() == [e for e in range(experts) for _ in range(-(-counts[e] // TILE))]
    places = np.asarray(groups.places_MX)
    assert ((places >= 0).sum(axis=1) == chosen).all()
    taken = places[places >= 0]
    assert len(set(taken.tolist())) == len(taken)
    row_of, expert_of = np.nonzero(places >= 0)[0], np.asarray(groups.tiles.ids_T)[taken // TILE]
    assert list(zip(row_of, expert_of, strict=True)) == list(zip(*np.nonzero(weights), strict=True))
    np.testing.assert_array_equal(groups.rows_TRD.reshape(-1, 256)[taken], x[row_of])
    np.testing.assert_array_equal(groups.weights_P[taken], weights[row_of, expert_of])
    for expert in range(experts):  # in their order, from the first place of the expert's first tile on
        first = TILE * (upto[expert] - -(-counts[expert] // TILE))
        assert taken[expert_of == expert].tolist() == list(range(first, first + counts[expert]))


@needs_interpreter
@pytest.mark.parametrize("rows", [128, 384, 2048])
def test_rows_of_an_expert_are_counted(rows):
    taken = np.random.default_rng(rows).random((2, rows)) < [[0.3], [1]]
    ranks, counts = interpreted(count_rows, jnp.asarray(taken, jnp.float32))
    np.testing.assert_array_equal(ranks, np.cumsum(taken, axis=1) - taken)
    np.testing.assert_array_equal(counts, taken.sum(axis=1))
