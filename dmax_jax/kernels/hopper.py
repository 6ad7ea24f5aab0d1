"""What the kernels for Hopper GPUs (H100, H200) share: where they run, tiles in shared memory, streams of tiles.

They are written in Pallas for Mosaic GPU, whose interface of jax 0.11 is used; with jax 0.10 the plain functions run.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref

ROWS = 64  # of a matrix product of one warpgroup; also the width of a stage in columns
SHARED_BYTES = 227 * 1024  # that a block of threads may use
RESERVED_BYTES = 6 * 1024  # of them for barriers and alignment


def is_hopper() -> bool:
    """Whether what is being traced runs on devices for these kernels, each by itself.

    The compiler can't split a kernel over several devices: where it might have to, the plain functions run. Within a
    `shard_map` over all axes of a mesh, or in a process that sees one device, it never has to.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_itself = jax.device_count() == 1 or 0 < len(mesh.axis_names) == len(mesh.manual_axes)
    return by_itself and has_hopper()


@functools.cache
def has_hopper() -> bool:
    """Whether this process sees devices that these kernels run on, under a JAX that they are written for."""
    device = jax.devices()[0]
    is_one = device.platform == "gpu" and getattr(device, "compute_capability", None) == "9.0"
    if is_one and jax.__version_info__ < (0, 11):
        warnings.warn(
            f"jax {jax.__version__} can't run the kernels for Hopper GPUs, 0.11 can (Python 3.12)", stacklevel=2
        )
        return False
    return is_one


@functools.cache
def multiprocessors() -> int:
    """Blocks of threads that run at once, one per multiprocessor."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def filled_up(rows: int) -> int:
    """Rows of the kernels that work on as many: a power of two from 16 on, or a multiple of 64."""
    return max(16, 1 << (rows - 1).bit_length()) if rows <= ROWS else rows + -rows % ROWS


def shared_tile(shape: tuple[int, ...], dtype: jnp.dtype):
    """Shared memory for tiles `[..., rows, columns]` in the order that the matrix units read.

    Both factors of a product must lie alike, and do where their rows have 128 bytes or more.
    """
    return plgpu.SMEM(shape, dtype, transforms=tile_transforms(shape[-1], dtype))


def tile_transforms(columns: int, dtype: jnp.dtype):
    """How a `shared_tile` lies in memory."""
    itemsize = jnp.dtype(dtype).itemsize
    together = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, together // itemsize)), plgpu.SwizzleTransform(together)


def stages_that_fit(stage_bytes: int, other_bytes: int, most: int = 6) -> int:
    """How many stages of a stream shared memory has room for."""
    return min(most, (SHARED_BYTES - RESERVED_BYTES - other_bytes) // stage_bytes)


class Stream:
    """A sequence of stages through a ring of buffers: one warpgroup fills them by asynchronous copies, others use them.

    `full` and `empty` are barriers, one per buffer: `full` counts a stage's copies, `empty` the warpgroups that use it.
    """

    def __init__(self, full, empty, stages: int):
        self.full, self.empty, self.stages = full, empty, stages

    def fill(self, steps, load) -> None:
        """Calls `load(step, slot, barrier)` for every step once its buffer is free, and waits for the last use."""

        @pl.loop(0, steps)
        def _fill(step):
            slot = lax.rem(step, self.stages)

            @pl.when(step >= self.stages)
            def _wait():
                plgpu.barrier_wait(self.empty.at[slot])

            load(step, slot, self.full.at[slot])

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _drain(step):
            plgpu.barrier_wait(self.empty.at[lax.rem(step, self.stages)])

    def use(self, step, multiply) -> None:
        """Calls `multiply(slot)`, which starts products, once the step's stage is there; frees it when done."""
        slot = lax.rem(step, self.stages)
        plgpu.barrier_wait(self.full.at[slot])
        multiply(slot)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.empty.at[slot])


def barriers(copies: int, warpgroups: int, stages: int):
    """The two barriers of a Stream."""
    return (
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )


def all_at_once(blocks: int, *, interpret) -> dict:
    """Arguments of a kernel whose blocks of threads wait for each other; their axis is "block".

    On a GPU they all run if there are no more than it has room for. The interpreter runs the grid's blocks one after
    another, and only those of a cluster together.
    """
    axis = "cluster" if interpret else "grid"
    return {axis: (blocks,), f"{axis}_names": ("block",)}


def signal(counter) -> None:
    """Adds 1 to an int32 in global memory. Who sees that also sees what this warpgroup has written there before.

    Of what it has copied there from shared memory, that holds once the copies have been waited for.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add_one(_, counter):
        utils.warpgroup_barrier()
        utils.SemaphoreRef(utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    add_one(counter)


def wait_for(counter, number) -> None:
    """Waits until the int32 has come to `number`: this warpgroup, and copies that it starts, see what was signalled."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait_until(_, counter, number):
        semaphore = utils.SemaphoreRef(utils.memref_ptr(counter))
        semaphore.wait(number.registers.item(), decrement=False, memory_scope="gpu")
        utils.inline_ptx("fence.proxy.async;", has_side_effects=True)  # copies are of another proxy than loads

    wait_until(counter, jnp.int32(number))


def scatter(into, places, values_C, layout) -> None:
    """Writes `values_C` into memory, as `into[places] = values_C` would; `places` are indices for each axis.

    Every thread writes the values that it has. Barriers before and after it, in shared memory, are the caller's.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, *[layout] * len(places)))
    def store(_, into, values, *places):
        words = ([utils.bitcast(word, word_type()) for word in array.registers.flat] for array in (values, *places))
        for value, *place in zip(*words, strict=True):
            indices = [arith.index_cast(ir.IndexType.get(), index) for index in place]
            memref.store(utils.bitcast(value, into.type.element_type), into, indices)

    store(into, values_C, *places)


def word_type() -> ir.Type:
    """That of a register, for inline code."""
    return ir.IntegerType.get_signless(32)


def differentiated_as(plain):
    """Decorates a kernel: its gradients are those of the plain function that it stands for."""

    def decorate(function):
        @jax.custom_vjp
        def run(*arguments):
            return function(*arguments)

        def forward(*arguments):
            return function(*arguments), arguments

        def backward(arguments, out_gradient):
            return jax.vjp(plain, *arguments)[1](out_gradient)

        run.defvjp(forward, backward)
        return run

    return decorate
