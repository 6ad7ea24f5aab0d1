"""Sums over the devices that share a model, made inside the kernel that goes on with them.

A device writes its part of a row into the memory of the others, and waits until theirs are in its own. Between GPUs of
one host that takes less time than the start of an all-reduce, and a layer stays one sequence of kernels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf

from dmax_jax.kernels.hopper import word_type
from dmax_jax.kernels.program import kernel, start_next, wait_for_earlier


@struct.dataclass
class Inbox:
    """Memory of a device that the others write to, and how many rounds of writing its rows have had.

    Two entries lie beside their round's number in 64 bits, which are written and read at once: who sees the number has
    the entries, in whatever order all arrives. Rounds alternate between two places: a device that sends round n + 2 has
    received round n + 1, which the others send after the kernel in which they received round n, so that its place is
    free. Hence all devices make the same rounds in the same order, one kernel after another.

    To XLA these are arrays that nobody changes. They must stay where they are while there are rounds, so no program may
    compute with them: XLA copies none of them as long as kernels and loops only hand them on. A device that stops
    sending leaves the others waiting for ever. The devices must be of one process, and reach each other's memory.
    """

    words: jax.Array  # int32 [devices, 2 rows, D], by the device that they come from
    rounds: jax.Array  # int32 [rows]
    places: jax.Array  # int32 [devices, 2], where in the memory of each this device writes: addresses of 64 bits


def open_inbox(axis: str, rows: int, width: int) -> Inbox:
    """Room for rows of `width` entries from each device along a mesh axis, once it is empty on all of them."""
    words = zeros((lax.axis_size(axis), 2 * rows, width))
    places = lax.all_gather(addresses(words), axis)[:, lax.axis_index(axis)]
    return Inbox(words, zeros((rows,)), places)


@kernel("shape")
def zeros(shape: tuple[int, ...], *, interpret=False, overlap=False) -> jax.Array:
    """Of 32 bits; those that XLA makes it may have in several places, or make again."""
    rows, width = math.prod(shape[:-1]), shape[-1]

    def body(out):
        wait_for_earlier(overlap)
        start_next(overlap)
        out.at[lax.axis_index("row")][...] = jnp.zeros((width,), jnp.int32)

    out_type = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    fill = plgpu.kernel(body, out_type=out_type, grid=(rows,), grid_names=("row",), interpret=interpret)
    return fill().reshape(shape)


def addresses(array: jax.Array) -> jax.Array:
    """Where `array[0]`, `array[1]`... begin in the device's memory: int32 [n, 2]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def write(_, array, out):
        for number in range(array.type.shape[0]):
            row, place = (utils.memref_ptr(utils.memref_slice(ref, number)) for ref in (array, out))
            utils.inline_ptx("st.global.b64 [$0], $1;", place, row)

    return plgpu.kernel(write, out_type=jax.ShapeDtypeStruct((len(array), 2), jnp.int32))(array)


def sum_over_devices(part_D: jax.Array, inbox: Inbox, row, number, layout) -> jax.Array:
    """Within a kernel, the sum in float32 of every device's part of a row, which has an even number of bfloat16s.

    It is made in the order of the devices, so that it is the same on all to the last bit. `number` is the round's.
    """
    devices, rows, _ = inbox.words.shape
    place = lax.rem(number, 2) * (rows // 2) + row
    send(part_D, inbox.places, place, number, layout)
    boxes = [inbox.words.at[device, place] for device in range(devices)]
    return sum(receive(box, number, layout).astype(jnp.float32) for box in boxes)


def send(part_D, places, row, number, layout) -> None:
    """Writes a part, and beside each two entries the number, to a row of each device's memory from its place on."""

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def write_marked(_, part_D, places, row, number):
        long = ir.IntegerType.get_signless(64)
        row, number = (arith.extui(long, array.registers.item()) for array in (row, number))
        mark = arith.shli(number, utils.c(32, long))
        pairs = [
            [utils.bitcast(utils.vector_slice(four, slice(at, at + 2)), word_type()) for at in (0, 2)]
            for four in part_D.registers
        ]
        slots = [utils.memref_ptr(utils.memref_slice(places, device)) for device in range(places.type.shape[0])]
        starts = [utils.inline_ptx("ld.global.b64 $0, [$1];", slot, result_types=long) for slot in slots]
        for start in starts:
            for entry, both in zip(part_D.layout.linear_thread_idxs(), pairs, strict=True):
                entry = arith.addi(arith.muli(row, utils.c(part_D.shape[0], long)), arith.index_cast(long, entry))
                place = arith.addi(start, arith.muli(entry, utils.c(4, long)))
                marked = [arith.ori(arith.extui(long, pair), mark) for pair in both]
                utils.inline_ptx("st.relaxed.sys.global.v2.b64 [$0], {$1, $2};", place, *marked)

    write_marked(part_D, places, row, number)


def receive(box, number, layout) -> jax.Array:
    """Waits until all of a part is there."""
    part_type = plgpu.ShapeDtypeStruct(box.shape, jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=part_type)
    def read_marked(_, box, number):
        fours, word, long = layout.to_mgpu(), word_type(), ir.IntegerType.get_signless(64)
        starts = [arith.index_cast(word, start) for start in fours.linear_thread_idxs()]
        spots = [utils.getelementptr(utils.memref_ptr(box), [start], word) for start in starts]
        types = [long, long] * len(spots)
        wait = scf.WhileOp(types, [])
        with ir.InsertionPoint(wait.before.blocks.append()):
            load = functools.partial(utils.inline_ptx, result_types=(long, long), has_side_effects=True)
            marked = [entry for spot in spots for entry in load("ld.relaxed.sys.global.v2.b64 {$0, $1}, [$2];", spot)]
            marks = [arith.trunci(word, arith.shrui(entry, utils.c(32, long))) for entry in marked]
            wrong = functools.reduce(arith.ori, [arith.xori(mark, number.registers.item()) for mark in marks])
            scf.condition(arith.cmpi(arith.CmpIPredicate.ne, wrong, utils.c(0, word)), marked)
        with ir.InsertionPoint(wait.after.blocks.append(*types)):
            scf.yield_([])
        pair_type = ir.VectorType.get((2,), ir.BF16Type.get())
        pairs = [utils.bitcast(arith.trunci(word, entry), pair_type) for entry in wait.results]
        registers = [utils.vector_concat(both) for both in zip(pairs[::2], pairs[1::2], strict=True)]
        return mgpu.FragmentedArray(_registers=np.array(registers, object), _layout=fours, _is_signed=None)

    return read_marked(box, number)
