"""Pallas's interpreter for Hopper kernels, which runs blocks, warpgroups and barriers on a CPU and looks for races."""

import collections
import dataclasses
import threading
from unittest import mock

import jax
import numpy as np
import pytest

needs_interpreter = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")


def interpreted(kernel, *arguments, detect_races=True, **settings):
    """What one kernel returns; fails if two of its threads touch the same memory unordered.

    Over several devices it finds races where there are none, as each starts the threads' clocks anew.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
    from jax.experimental.pallas import mosaic_gpu

    interpreter.reset_gpu_interpret_mode_state()  # an earlier failure would break this run
    how = mosaic_gpu.InterpretGPUParams(detect_races=detect_races)
    patches = (
        mock.patch.object(gpu_callbacks, "wgmma", also_from_registers(gpu_callbacks)),
        mock.patch.object(JaxprInterpreter, "_interpret_inline_mgpu_p", counting(gpu_callbacks)),
        # Memory of two types is a ring, of which one part may be of one type while another is still of the other.
        mock.patch.object(gpu_callbacks, "call_tag_ref_union", lambda token, *_: token),
    )
    with patches[0], patches[1], patches[2]:
        out = jax.block_until_ready(kernel(*arguments, interpret=how, **settings))
    assert not (detect_races and interpreter.get_races().races_found)
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
    """The interpreter's part for inline code: what orders blocks, or goes from one's to another's, and the rest.

    That is `signal`, `wait_for` and `scatter` of `hopper.py`, what `device_sums.py` moves, all of `clusters.py`,
    where what is counted are the bytes that have come and were expected, conversions, and sums within warps.
    """
    from jax._src import callback

    changed = threading.Condition()
    inboxes = {}  # parts on their way, by the devices that they go to and come from, and their place there

    def state():
        """The memory of the kernel that runs now (a compiled kernel is called again), counts and clocks beside it."""
        memory = callbacks._get_shared_memory()
        return memory, *vars(memory).setdefault("counted", (collections.Counter(), {}))

    @callbacks.fail_on_exception
    def add_one(token, thread, *place, number=1):
        with changed:
            memory, counts, clocks = state()
            clock = memory.incr_clock(thread)
            counts[key(place)] += number
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
    def wait_for_bytes(token, thread, counter):
        token = wait_until(token, thread, counter, 0)
        assert state()[1][key([counter])] == 0  # no more than expected
        return token

    @callbacks.fail_on_exception
    def store(token, thread, mesh_location, ref, *arrays):
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

    @callbacks.fail_on_exception
    def expect_bytes(token, _, counter, size):
        with changed:
            _, counts, _ = state()
            counts[key([counter])] -= int(size)
            changed.notify_all()
        return token

    @callbacks.fail_on_exception
    def give_all(token, thread, location, boxes, places, counter, tiles):
        memory = callbacks._get_shared_memory()
        info = callbacks.memory.GPULoggingInfo(location, thread)
        sources = [callbacks.HostAllocationKey.from_array(tile) for tile in tiles]
        values = [memory.get_buffer_content(at, memory.access(at, ()), thread, logging_info=info)[0] for at in sources]
        blocks = next(len(value) for value in values if value.ndim == 3)
        for block in range(blocks):
            there = in_block(block, counter)
            with changed:
                _, counts, _ = state()
                assert changed.wait_for(lambda: key([there]) in counts, timeout=60)  # noqa: B023
            given = [value[block] if value.ndim == 3 else value for value in values]
            for value, box, place in zip(given, boxes, places, strict=True):
                callbacks._swap(token, location, thread, in_block(block, box), place, value, None)
            add_one(token, thread, there, number=sum(value.nbytes for value in given))
        return token

    @callbacks.fail_on_exception
    def write_marked(token, thread, devices, part, row, number):
        with changed:
            for device in range(devices):
                there = device, thread.device_id, int(row)
                assert there not in inboxes  # its last round has been received
                inboxes[there] = int(number), np.array(part)
            changed.notify_all()
        return token

    @callbacks.fail_on_exception
    def read_marked(token, thread, number, device, row):
        here = thread.device_id, int(device), int(row)
        with changed:
            assert changed.wait_for(lambda: here in inboxes, timeout=60)
            sent, part = inboxes.pop(here)
        assert sent == number
        return token, part

    def in_block(number, array):
        allocation = callbacks.HostAllocationKey.from_array(array)
        return dataclasses.replace(allocation, block_id=number).as_np_array

    def key(place):
        return tuple(int(index) for array in place for index in np.ravel(array))

    def interpret(self, equation, token, get_values):
        values = get_values()
        count = equation.params["pytree_args"].num_leaves
        arguments = jax.tree.unflatten(equation.params["pytree_args"], values[:count])
        place = values[count:]  # of a counter within an array
        match equation.params["mgpu_fn"].__name__:
            case "convert":  # 8-bit weights
                return token, [values[0].astype("bfloat16")]
            case "sum_up_to":  # of a warp's threads
                return token, [values[0].reshape(-1, 32).cumsum(axis=1).reshape(-1)]
            case "store":
                run, operands = store, (self.mesh_location, *values)
            case "add_one":
                run, operands = add_one, (values[0], *place)
            case "wait_until":
                run, operands = wait_until, (values[0], *place, values[1])
            case "expect_bytes":
                run, operands = expect_bytes, arguments
            case "wait_for_bytes":
                run, operands = wait_for_bytes, arguments
            case "give_all":
                boxes, counter, _, tiles = arguments
                places = jax.tree.unflatten(equation.params["pytree_ref_transforms"], place)[: len(boxes)]
                run, operands = give_all, (self.mesh_location, boxes, places, counter, tiles)
            case "write_marked":
                part, _, row, number = values
                run, operands = write_marked, (equation.invars[1].aval.shape[0], part, row, number)
            case "read_marked":
                types = callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(equation.outvars[0].aval.shape, "bfloat16")
                token, part = callback.io_callback(read_marked, types, token, self.thread, values[1], *place)
                return token, [part]
            case "wait_for_cluster":
                return token, []
        return callback.io_callback(run, callbacks.TOKEN_SHAPE_DTYPE, token, self.thread, *operands), []

    return interpret
