"""Pallas's interpreter for Hopper kernels, which runs blocks, warpgroups and barriers on a CPU and looks for races."""

from unittest import mock

import jax
import numpy as np
import pytest

needs_interpreter = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")


def interpreted(kernel, *arguments, **settings):
    """What one kernel returns; fails if two of its threads touch the same memory unordered."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax.experimental.pallas import mosaic_gpu

    interpreter.reset_gpu_interpret_mode_state()  # an earlier failure would break this run
    how = mosaic_gpu.InterpretGPUParams(detect_races=True)
    with mock.patch.object(gpu_callbacks, "wgmma", also_from_registers(gpu_callbacks)):
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
