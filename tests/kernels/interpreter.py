"""Pallas's interpreter for Hopper kernels, which runs blocks, warpgroups and barriers on a CPU and looks for races."""

import collections
import threading
from unittest import mock

import jax
import numpy as np
import pytest

needs_interpreter = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")


def interpreted(kernel, *arguments, **settings):
    """What one kernel returns; fails if two of its threads touch the same memory unordered."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
    from jax.experimental.pallas import mosaic_gpu

    interpreter.reset_gpu_interpret_mode_state()  # an earlier failure would break this run
    how = mosaic_gpu.InterpretGPUParams(detect_races=True)
    patches = (
        mock.patch.object(gpu_callbacks, "wgmma", also_from_registers(gpu_callbacks)),
        mock.patch.object(JaxprInterpreter, "_interpret_inline_mgpu_p", counting(gpu_callbacks)),
        # Memory of two types is a ring, of which one part may be of one type while another is still of the other.
        mock.patch.object(gpu_callbacks, "call_tag_ref_union", lambda token, *_: token),
    )
    with patches[0], patches[1], patches[2]:
        out = jax.block_until_ready(kernel(*arguments, interpret=how, **settings))
    assert not interpreter.get_races().races_found
    return out


def also_from_registers(callbacks):
    """The interpreter's matrix product; that of jax 0.11 wants both factors in shared memory, this one takes values."""
    plain = callbacks.wgmma

    def wgmma(*, token, mesh_location, thread, source_info=None, **operands):
        left = np.asarray(operands["a_allocation_key_as_array"])
        if left.ndim < 2:  # a key to shared memory
            return plain(token=token, mesh_location=mesh_location, thread=thread, source_info=source_info, **operands)
        memory = callbacks._get_shared_memory()
        how = {"logging_info": callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)}

        def place(name):
            key = callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
            transforms = callbacks._remove_noop_transforms(operands[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, transforms))

        sums, right = (memory.get_buffer_content(*place(name), thread, **how)[0] for name in ("acc", "b"))
        sums = sums + np.matmul(left, right, dtype=sums.dtype)
        memory.store_buffer_content(*place("acc"), sums, thread, **how)
        return token

    return wgmma


def counting(callbacks):
    """The interpreter's part for inline code.

    That is `signal` and `wait_for`, which order what blocks do, `scatter`, conversions and sums within warps.
    """
    from jax._src import callback

    changed = threading.Condition()

    def state():
        """The memory of the kernel that runs now (a compiled kernel is called again), counts and clocks beside it."""
        memory = callbacks._get_shared_memory()
        return memory, *vars(memory).setdefault("counted", (collections.Counter(), {}))

    @callbacks.fail_on_exception
    def add_one(token, thread, *place):
        with changed:
            memory, counts, clocks = state()
            clock = memory.incr_clock(thread)
            counts[key(place)] += 1
            clocks.setdefault(key(place), clock).update(clock)
            changed.notify_all()
        return token

    @callbacks.fail_on_exception
    def wait_until(token, thread, *place_and_number):
        *place, number = place_and_number
        with changed:
            memory, counts, clocks = state()
            assert changed.wait_for(lambda: counts[key(place)] >= number, timeout=60)
            clock = clocks[key(place)].copy()
        with memory.lock:
            memory.clocks[thread].update(clock)
        return token

    @callbacks.fail_on_exception
    def store(token, mesh_location, thread, ref, *arrays):
        values, *places = map(np.asarray, arrays)
        memory = callbacks._get_shared_memory()
        buffer = callbacks.HostAllocationKey.from_array(ref)
        info = callbacks.memory.GPULoggingInfo(mesh_location, thread)
        order = np.lexsort(places[::-1])
        along = np.eye(1, len(places), len(places) - 1)  # from a place to the next one in its row
        jumps = (np.diff(np.stack(places, axis=1)[order], axis=0) != along).any(axis=1)
        for run in np.split(order, np.flatnonzero(jumps) + 1):
            *row, start = (int(axis[run[0]]) for axis in places)
            access = callbacks.interpret_utils.Access((*row, slice(start, start + len(run))))
            memory.store_buffer_content(buffer, access, values[run], thread, logging_info=info)
        return token

    def key(place):
        return tuple(int(index) for array in place for index in np.ravel(array))

    def interpret(self, equation, token, get_values):
        first, *values = get_values()
        name = equation.params["mgpu_fn"].__name__
        match name:
            case "convert":  # 8-bit weights
                return token, [first.astype("bfloat16")]
            case "count_up_to":  # the flags of a warp's threads
                return token, [first.reshape(-1, 32).cumsum(axis=1).reshape(-1)]
            case "store":
                run, operands = store, (self.mesh_location, self.thread, first, *values)
            case "add_one":
                run, operands = add_one, (self.thread, first, *values)
            case "wait_until":  # a counter, the number, and then the place within the counters
                run, operands = wait_until, (self.thread, first, *values[1:], values[0])
        return callback.io_callback(run, callbacks.TOKEN_SHAPE_DTYPE, token, *operands), []

    return interpret
