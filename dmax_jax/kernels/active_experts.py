"""Which experts are active, that is, chosen by any row, as a list: by a plain function, and within a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from dmax_jax.kernels.hopper import scatter, word_type

THREADS = 128  # of a warpgroup
WARP = 32


def list_active(active_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the true entries in ascending order, and any numbers after them; and how many are true.

    Compared and summed rather than sorted or scattered, which a GPU does in few small programs.
    """
    order_E = jnp.arange(active_E.shape[0])
    upto_E = jnp.sum((order_E[None, :] <= order_E[:, None]) & active_E[None, :], axis=1, dtype=jnp.int32)
    # The a-th active one is the first up to which there are a + 1, so those up to which there are fewer stand before.
    return jnp.sum(upto_E[None, :] <= order_E[:, None], axis=1, dtype=jnp.int32), upto_E[-1]


class SharedList:
    """All experts in the shared memory of a block of threads: the active ones in ascending order, then the others.

    The first `warpgroups` of the block make the list together; E has to be a multiple of their threads.
    """

    def __init__(self, warpgroups: int, upto_s, ids_s, counted, listed):
        self.warpgroups, self.upto_s, self.ids, self.counted, self.listed = warpgroups, upto_s, ids_s, counted, listed

    @staticmethod
    def scratch(warpgroups: int, experts: int) -> list:
        """What `SharedList` takes after the first argument, as a kernel's scratch."""
        numbers_s = plgpu.SMEM((experts,), jnp.int32)
        return [numbers_s, numbers_s, *[plgpu.Barrier(num_arrivals=warpgroups)] * 2]

    @staticmethod
    def scratch_bytes(experts: int) -> int:
        return 8 * experts

    def make(self, weights) -> None:
        """Lists the experts with a weight above 0 in any row of `weights`, [M, E] in global memory.

        A thread reads all rows of one expert, so that a warp reads numbers that stand side by side. It counts the
        active experts before its own: those of its warp by a sum within it, the others by the totals of warps.
        """
        M, E = weights.shape
        if E % (self.warpgroups * THREADS):
            raise ValueError(f"{E} experts are no multiple of the {self.warpgroups * THREADS} threads that list them")

        def flags(values):
            return jnp.where(values > 0, 1.0, 0.0)

        by_expert = plgpu.Layout.TCGEN05_TMEM_NATIVE(1)  # every thread has a row of an array
        by_thread = by_expert.reduce(1)
        starts = [first + lax.axis_index("warpgroup") * THREADS for first in range(0, E, self.warpgroups * THREADS)]
        active, upto = [], []
        for start in starts:
            own = pl.ds(start, THREADS)
            if M == 1:  # for which Mosaic (jax 0.11) finds no layout in two dimensions
                is_active_C = flags(plgpu.load(weights.at[0, own], layout=by_thread, optimized=False))
            else:
                weights_CM = plgpu.load(weights.at[:, own].transpose((1, 0)), layout=by_expert, optimized=False)
                is_active_C = jnp.max(flags(weights_CM), axis=1)  # of flags, as a row of NaN hides no other row's
            active.append(is_active_C.astype(jnp.int32))
            upto.append(sum_in_warp(active[-1], by_thread))
            self.upto_s[own] = upto[-1]
        plgpu.barrier_arrive(self.counted)
        plgpu.barrier_wait(self.counted)
        totals = self.totals()
        count = sum(totals)
        for start, active_C, upto_C in zip(starts, active, upto, strict=True):
            expert_C = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=by_thread) + start
            before_C = upto_C - active_C
            for warp, total in enumerate(totals):
                before_C += jnp.where(expert_C >= (warp + 1) * WARP, total, 0)
            place_C = jnp.where(active_C > 0, before_C, count + expert_C - before_C)
            scatter(self.ids, (place_C,), expert_C, by_thread)
        plgpu.barrier_arrive(self.listed)

    def totals(self) -> list:
        return [self.upto_s[first + WARP - 1] for first in range(0, self.upto_s.shape[0], WARP)]

    def wait(self) -> jax.Array:
        """Waits for the list, and returns how many are active. Every warpgroup has to call it once."""
        plgpu.barrier_wait(self.listed)
        return sum(self.totals())


def sum_in_warp(numbers_C, layout):
    """For every thread the sum of the int32 of its warp's threads up to itself."""

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(numbers_C.shape, numbers_C.dtype, layout=layout)
    )
    def sum_up_to(_, numbers):
        steps = "".join(
            f"shfl.sync.up.b32 other|is_there, $0, {distance}, 0, -1; @is_there add.s32 $0, $0, other;"
            for distance in (1, 2, 4, 8, 16)
        )
        scan = f"{{ .reg .pred is_there; .reg .s32 other; mov.b32 $0, $1; {steps} }}"
        registers = np.empty_like(numbers.registers)
        for place, number in np.ndenumerate(numbers.registers):
            one = mgpu.utils.bitcast(number, word_type())
            sum_ = mgpu.utils.inline_ptx(scan, one, result_types=one.type, has_side_effects=True, convergent=True)
            registers[place] = mgpu.utils.bitcast(sum_, number.type)
        return mgpu.FragmentedArray(_registers=registers, _layout=numbers.layout, _is_signed=numbers.is_signed)

    return sum_up_to(numbers_C)
