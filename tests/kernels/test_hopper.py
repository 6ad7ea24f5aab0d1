import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.config import MeshConfig
from dmax_jax.kernels import hopper
from dmax_jax.kernels.hopper import all_at_once, differentiated_as, is_hopper, signal, wait_for
from dmax_jax.sharding import make_mesh
from tests.kernels.interpreter import interpreted, needs_interpreter


def exchange(x, *, waits: bool, interpret):
    """Two warpgroups: one writes shared memory, the other copies it out, after the first one or not."""

    def body(source, out, shared, written):
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _write():
            shared[...] = source[...]
            plgpu.barrier_arrive(written)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _read():
            if waits:
                plgpu.barrier_wait(written)
            out[...] = shared[...]
            if not waits:
                plgpu.barrier_wait(written)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        interpret=interpret,
    )(x)


@needs_interpreter
def test_the_interpreter_sees_a_race():
    x = jnp.arange(128.0)
    np.testing.assert_array_equal(interpreted(functools.partial(exchange, waits=True), x), x)
    with pytest.raises(AssertionError):
        interpreted(functools.partial(exchange, waits=False), x)


def hand_over(x, *, waits: bool, interpret):
    """Two blocks of threads: each copies what the other has written to global memory, after its signal or not."""

    def body(source, counters, out, middle, shared, arrived):
        block = lax.axis_index("block")
        middle[block] = source[block]
        signal(counters.at[block])
        if waits:
            wait_for(counters.at[1 - block], 1)
        plgpu.copy_gmem_to_smem(middle.at[1 - block], shared, arrived)
        plgpu.barrier_wait(arrived)
        out[block] = shared[...]

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        **all_at_once(2, interpret=interpret),
        scratch_types=[plgpu.SMEM(x.shape[1:], x.dtype), plgpu.Barrier()],
        interpret=interpret,
    )(x, jax.new_ref(jnp.zeros(2, jnp.int32)))[0]


@needs_interpreter
def test_blocks_of_threads_hand_over_what_they_have_written():
    x = jnp.arange(256.0).reshape(2, 128)
    np.testing.assert_array_equal(interpreted(functools.partial(hand_over, waits=True), x), x[::-1])
    with pytest.raises(AssertionError):
        interpreted(functools.partial(hand_over, waits=False), x)


def test_gradients_are_those_of_the_plain_function():
    run = differentiated_as(lambda x: (x**3, x))(lambda x: (2 * x, x))
    value, pull_back = jax.vjp(run, 3.0)
    assert value == (6.0, 3.0)
    assert pull_back((1.0, 10.0)) == (37.0,)


def test_a_cpu_is_no_hopper_gpu():
    assert not is_hopper()


def test_no_axis_of_a_kernel_has_the_name_of_a_mesh_axis():
    named = set()
    for path in pathlib.Path(hopper.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "axis_index":
                named |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert "warpgroup" in named
    assert not named & set(make_mesh(MeshConfig()).axis_names)  # the index would be the device's
