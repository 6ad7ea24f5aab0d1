import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.active_experts import SharedList, list_active
from tests.kernels.interpreter import interpreted, needs_interpreter


@pytest.mark.parametrize("active", [[1, 4, 5], list(range(6)), []])
def test_active_ones_are_listed_in_order(active):
    ids, count = jax.jit(list_active)(jnp.isin(jnp.arange(6), jnp.array(active, int)))
    assert ids[:count].tolist() == active


def list_in_shared_memory(weights, *, interpret):
    """What a third warpgroup reads when two have listed the experts, and their number after it."""
    E = weights.shape[1]

    def body(weights, out, *scratch):
        warpgroup, experts = lax.axis_index("warpgroup"), SharedList(2, *scratch)
        pl.when(warpgroup < 2)(lambda: experts.make(weights))
        count = experts.wait()

        @pl.when(warpgroup == 2)
        def _read():
            out[pl.ds(0, E)] = experts.ids[...]
            out[E] = count

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((E + 1,), jnp.int32),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=SharedList.scratch(2, E),
        interpret=interpret,
    )(weights)


@needs_interpreter
@pytest.mark.parametrize("share", [0.3, 1])
def test_warpgroups_list_the_active_ones_in_order_and_then_the_others(share):
    active = np.random.default_rng(0).random(512) < share
    weights = jnp.zeros((3, 512)).at[np.arange(512) % 3, np.arange(512)].set(jnp.float32(active))
    weights = jnp.concatenate([weights, jnp.full((1, 512), jnp.nan)])  # one row of NaN changes nothing for others
    *ids, count = interpreted(list_in_shared_memory, weights).tolist()
    assert count == active.sum()
    assert ids == [*np.flatnonzero(active), *np.flatnonzero(~active)]
