"""The rate at which the devices read their memory: the limit of everything that reads weights."""

import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

REPEATS = 5
PASSES = 16  # over the array in one program, so that starting it doesn't count


def read_bandwidth(mesh: Mesh, bytes_per_device: int) -> float:
    """Bytes per second of all devices of the mesh together: the median over repeated sums of a large random array."""
    devices = mesh.devices.size
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (devices, max(1, bytes_per_device // 4))
    make = jax.jit(lambda: jax.random.bits(jax.random.key(0), shape, jnp.uint32), out_shardings=sharding)

    def sum_repeatedly(array: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, PASSES, lambda _, sum_: jnp.sum(array ^ sum_[:, None], axis=1), array[:, 0])

    total = jax.jit(sum_repeatedly, out_shardings=sharding)
    array = make()
    jax.block_until_ready(total(array))
    seconds = [_seconds(total, array) for _ in range(REPEATS)]
    return PASSES * array.nbytes / statistics.median(seconds)


def _seconds(function, array: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(array))
    return time.perf_counter() - start
