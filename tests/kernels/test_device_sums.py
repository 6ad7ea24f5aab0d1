"""Sums over devices. That they come out the same round after round on two GPUs, no test here can say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dmax_jax.kernels.device_sums import Inbox, zeros
from dmax_jax.kernels.residual_norm import add_and_norm_over, fused_add_and_norm, plain_add_and_norm
from dmax_jax.kernels.row_digits import in_digits
from tests.kernels.interpreter import interpreted, needs_interpreter

AXIS, EPS, ROUNDS, ROWS, WIDTH = "tensor", 1e-6, 3, 2, 512


def on_devices(function, devices: int):
    """Calls `function(x, parts, weight)` on each device with parts of its own; results have an axis of devices."""
    mesh, whole = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,)), PartitionSpec()

    def on_device(x_MD, parts, weight_D):
        return jax.tree.map(lambda result: result[None], function(x_MD, parts[0], weight_D))

    specs = {"in_specs": (whole, PartitionSpec(AXIS), whole), "out_specs": PartitionSpec(AXIS)}
    return jax.jit(jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs))


def draw(devices: int):
    rng = np.random.default_rng(0)
    x_MD = jnp.asarray(3 * rng.normal(size=(ROWS, WIDTH)), jnp.bfloat16)
    parts = jnp.asarray(rng.normal(size=(devices, ROUNDS, 2, ROWS, WIDTH)), jnp.float32)
    return x_MD, parts, jnp.asarray(1 + rng.normal(size=WIDTH) / 4, jnp.bfloat16)


def expected_rounds(x_MD, parts, weight_D):
    for number in range(ROUNDS):
        sums = parts[:, number].sum(axis=1).astype(jnp.bfloat16)
        x_MD, normal_MD, _ = plain_add_and_norm(x_MD, sums, weight_D, eps=EPS)
    return x_MD, normal_MD


@needs_interpreter
@pytest.mark.parametrize("devices", [2, 3])
def test_every_device_gets_the_sum_of_all_in_every_round(devices):
    inputs = draw(devices)

    def rounds(x_MD, parts, weight_D, interpret):
        for number in range(ROUNDS):  # the interpreter's kernels have memory of their own, so each is told its round
            words, places = jnp.zeros((devices, 2 * ROWS, WIDTH), jnp.int32), jnp.zeros((devices, 2), jnp.int32)
            inbox = Inbox(words, jnp.full(ROWS, number), places)
            x_MD, normal_MD, digits = fused_add_and_norm(
                x_MD, parts[number], weight_D, inbox, eps=EPS, digits=True, interpret=interpret
            )
        return x_MD, normal_MD, digits

    def run(*inputs, interpret):
        return on_devices(functools.partial(rounds, interpret=interpret), devices)(*inputs)

    found = interpreted(run, *inputs, detect_races=False)
    for device in range(devices):
        total_MD, normal_MD, digits = jax.tree.map(lambda result: result[device], found)  # noqa: B023
        for one, other in zip((total_MD, normal_MD), expected_rounds(*inputs), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(digits.values, in_digits(normal_MD).values)


def test_without_an_inbox_the_sum_is_the_same():
    x_MD, parts, weight_D = draw(2)
    inputs = jnp.round(x_MD), jnp.round(parts), weight_D  # all sums are exact

    def rounds(x_MD, parts, weight_D):
        for part in parts:
            x_MD, normal_MD, _ = add_and_norm_over(AXIS, None, x_MD, part, weight_D, EPS)
        return x_MD, normal_MD

    total_MD, normal_MD = on_devices(rounds, 2)(*inputs)
    expected_MD, expected_normal_MD = expected_rounds(*inputs)
    for device in range(2):
        np.testing.assert_array_equal(total_MD[device], expected_MD)
        np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (normal_MD[device], expected_normal_MD)), 0.02)


@needs_interpreter
def test_memory_is_empty():
    np.testing.assert_array_equal(interpreted(zeros, (2, 3, 128)), np.zeros((2, 3, 128)))
