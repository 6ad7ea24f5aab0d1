"""What the blocks of threads of a cluster, each of one warpgroup, copy to each other's shared memory.

Each block knows how many bytes will come and waits for those; so nothing else has to arrive at its barrier from other
blocks. (With `plgpu.async_store_smem` every thread does, at every block, and first waits until all that it has stored
is there.) The cluster has one axis, "part". The order is `expect`, `give`, `wait_for_all` and `leave`, each once.
"""

import math

from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir.dialects import arith

from dmax_jax.kernels.hopper import tile_transforms, word_type


def counter():
    """Shared memory for a barrier that counts bytes."""
    return plgpu.SMEM((2,), "int32")


def expect(counter, size: int) -> None:
    """Says that the cluster will store `size` bytes in this block's shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def expect_bytes(_, counter, size):
        barrier, one = barrier_in(counter), utils.single_thread_predicate()
        utils.inline_ptx("mbarrier.init.shared::cta.b64 [$0], 1;", barrier.get_ptr(), predicate=one)
        utils.inline_ptx("fence.mbarrier_init.release.cluster;")
        barrier.arrive_expect_tx(size.registers.item(), predicate=one)
        utils.inline_ptx("barrier.cluster.arrive.relaxed.aligned;", convergent=True)

    expect_bytes(counter, lax.full((), size, "int32"))


def give(tiles, boxes, counter) -> None:
    """Copies tiles from this block's shared memory to that of all blocks of the cluster, itself included.

    The n-th block gets `tile[n]` of each tile [blocks, rows, columns], and all of each tile [rows, columns], in a box
    [blocks, rows, columns] of its own, at this block's number. All are `shared_tile`s.
    """
    own, blocks = lax.axis_index("part"), boxes[0].shape[0]
    plgpu.commit_smem()

    def types(refs):
        return tuple(plgpu.RefType(tile_transforms(ref.shape[-1], ref.dtype)) for ref in refs)

    sizes = [math.prod(box.shape[1:]) * box.dtype.itemsize for box in boxes]
    steps = [size if len(tile.shape) == 3 else 0 for tile, size in zip(tiles, sizes, strict=True)]

    @plgpu.inline_mgpu(arg_types=(types(boxes), plgpu.RefType(), plgpu.Layout.WG_SPLAT, types(tiles)))
    def give_all(_, boxes, counter, own, tiles):
        utils.inline_ptx("barrier.cluster.wait.aligned;", convergent=True)  # until every block expects its bytes
        own = own.registers.item()
        with utils.when(utils.single_thread_predicate()):
            for number in range(1, blocks + 1):  # from the block after it on, so that not all give to the same one
                peer = arith.remui(arith.addi(own, utils.c(number, word_type())), utils.c(blocks, word_type()))
                for tile, box, size, step in zip(tiles, boxes, sizes, steps, strict=True):
                    copy = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
                    utils.inline_ptx(
                        f"""{{
                            .reg .b32 there, counter, start;
                            mapa.shared::cluster.u32 there, $0, $3;
                            mapa.shared::cluster.u32 counter, $1, $3;
                            mad.lo.u32 start, $3, {step}, $2;
                            {copy} [there], [start], {size}, [counter];
                        }}""",
                        *(utils.memref_ptr(box), barrier_in(counter).get_ptr(), utils.memref_ptr(tile), peer),
                        has_side_effects=True,
                    )

    give_all(tuple(box.at[own] for box in boxes), counter, own, tuple(tiles))


def wait_for_all(counter) -> None:
    """Waits until all bytes that this block expects are there."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait_for_bytes(_, counter):
        # Mosaic's own wait orders only what comes from this block.
        test = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [$0], 0;"
        utils.inline_ptx(f"{{.reg .pred there; again: {test} @!there bra again;}}", barrier_in(counter).get_ptr())
        utils.inline_ptx("barrier.cluster.arrive.relaxed.aligned;", convergent=True)

    wait_for_bytes(counter)


def leave() -> None:
    """Waits until the cluster's other blocks have got everything: before that, none of its memory may be freed."""

    @plgpu.inline_mgpu()
    def wait_for_cluster(_):
        utils.inline_ptx("barrier.cluster.wait.aligned;", convergent=True)

    wait_for_cluster()


def barrier_in(counter) -> utils.BarrierRef:
    return utils.BarrierRef(utils.memref_ptr(counter), utils.c(0, word_type()), phases=None, num_barriers=1)
