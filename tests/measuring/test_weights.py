import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmax_jax.config import MeshConfig
from dmax_jax.kernels.quantised_weight import KINDS
from dmax_jax.measuring.bandwidth import read_bandwidth
from dmax_jax.measuring.weights import random_params, route_uniformly
from dmax_jax.model.params import init_params, param_shardings
from dmax_jax.model.quantisation import quantise_params, quantised_shardings
from dmax_jax.model.router import route
from dmax_jax.sharding import DECODE, make_mesh
from tests.models import SMALL, small_params


def test_weights_are_those_of_init_params_wherever_they_lie():
    mesh = make_mesh(MeshConfig(data=1, tensor=2))
    found = random_params(jax.random.key(3), SMALL, jnp.bfloat16, mesh)
    expected = jax.jit(init_params, static_argnums=(1, 2))(jax.random.key(3), SMALL, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == param_shardings(SMALL, mesh, DECODE)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_weights_are_those_of_init_params_rounded(kind):
    mesh = make_mesh(MeshConfig(data=1, tensor=2))
    found = random_params(jax.random.key(3), SMALL, jnp.bfloat16, mesh, kind=kind)
    expected = quantise_params(random_params(jax.random.key(3), SMALL, jnp.bfloat16, mesh), SMALL, kind)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shardings = quantised_shardings(param_shardings(SMALL, mesh, DECODE), SMALL)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings


def test_uniform_routing_spreads_equal_rows_over_all_experts():
    moe = small_params().layers[1].mlp
    spread = route_uniformly(small_params(), 600, jax.random.key(0)).layers[1].mlp
    x_MD = jnp.ones((500, SMALL.hidden_size))
    alike_ME = route(x_MD, moe.router, moe.expert_bias, SMALL).weights_ME
    assert len(np.unique(alike_ME, axis=0)) == 1
    spread_ME = route(x_MD, spread.router, spread.expert_bias, SMALL).weights_ME
    np.testing.assert_allclose((spread_ME > 0).sum(0), 500 * 2 / 6, rtol=0.25)
    assert len(np.unique(spread_ME > 0, axis=0)) > 6
    np.testing.assert_allclose(spread_ME.sum(1), SMALL.routed_scaling_factor, rtol=1e-5)


def test_bandwidth_is_that_of_all_devices():
    assert 1e8 < read_bandwidth(make_mesh(MeshConfig(data=1, tensor=2)), 1 << 24) < 1e13
