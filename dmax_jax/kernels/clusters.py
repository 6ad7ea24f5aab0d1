"""What the blocks of threads of a cluster, each of one warpgroup, store in each other's shared memory.

Each block knows how many bytes will come and waits for those; so nothing else has to arrive at its barrier from other
blocks. (With `plgpu.async_store_smem` every thread does, at every block, and first waits until all that it has stored
is there.) The cluster has one axis, "part". The order is `expect`, `give` and `wait_for_all`, each once.
"""

from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from dmax_jax.kernels.hopper import tile_transforms


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


def give(parcels, boxes, counter) -> None:
    """Stores the n-th parcel, values [rows, columns] of layout WGMMA, in the shared memory of the n-th block.

    There each value goes into a box of its own, a `shared_tile` [blocks, rows, columns], at this block's number.
    """
    own = lax.axis_index("part")
    transforms = tuple(tile_transforms(box.shape[-1], box.dtype) for box in boxes)
    refs = tuple(plgpu.RefType(transform) for transform in transforms)
    layouts = ((plgpu.Layout.WGMMA,) * len(boxes),) * len(parcels)

    @plgpu.inline_mgpu(arg_types=(refs, plgpu.RefType(), plgpu.Layout.WG_SPLAT, layouts))
    def give_all(_, boxes, counter, own, parcels):
        utils.inline_ptx("barrier.cluster.wait.aligned;", convergent=True)  # until every block expects its bytes
        for part in range(len(parcels)):
            is_own = arith.cmpi(arith.CmpIPredicate.eq, own.registers.item(), utils.c(part, integer(32)))
            with utils.when(is_own):  # each begins with the block after it, so that not all want the same one
                for peer in (*range(part + 1, len(parcels)), *range(part + 1)):
                    for value, box, (_, swizzle) in zip(parcels[peer], boxes, transforms, strict=True):
                        value.store_tiled_async(
                            box,
                            barrier_in(counter),
                            cluster_dim=utils.gpu.Dimension.x,
                            cluster_idx=utils.c(peer, ir.IndexType.get()),
                            swizzle=swizzle.swizzle,
                        )

    give_all(tuple(box.at[own] for box in boxes), counter, own, tuple(map(tuple, parcels)))


def wait_for_all(counter) -> None:
    """Waits until all bytes that this block expects are there."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait_for_bytes(_, counter):
        # Mosaic's own wait orders only what comes from this block.
        test = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 there, [$0], 0;"
        utils.inline_ptx(f"{{.reg .pred there; again: {test} @!there bra again;}}", barrier_in(counter).get_ptr())

    wait_for_bytes(counter)


def barrier_in(counter) -> utils.BarrierRef:
    return utils.BarrierRef(utils.memref_ptr(counter), utils.c(0, integer(32)), phases=None, num_barriers=1)


def integer(bits: int) -> ir.Type:
    return ir.IntegerType.get_signless(bits)
