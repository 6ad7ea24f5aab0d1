"""Pallas's interpreter for Hopper kernels, which runs blocks, warpgroups and barriers on a CPU and looks for races."""

import jax
import pytest

needs_interpreter = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax 0.11")


def interpreted(kernel, *arguments, **settings):
    """What one kernel returns; fails if two of its threads touch the same memory unordered."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax.experimental.pallas import mosaic_gpu

    interpreter.reset_gpu_interpret_mode_state()  # an earlier failure would break this run
    how = mosaic_gpu.InterpretGPUParams(detect_races=True)
    out = jax.block_until_ready(kernel(*arguments, interpret=how, **settings))
    assert not interpreter.get_races().races_found
    return out
