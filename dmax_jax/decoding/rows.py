"""The state of a batch that is being decoded: each row at a block of its own, one forward after another."""

import jax
import jax.numpy as jnp
from flax import struct

from dmax_jax.decoding.block import Block, enter_block, freeze
from dmax_jax.model.cache import KVCache


@struct.dataclass
class Trace:
    """Every block after every forward of a row; entries from a row's number of forwards on mean nothing."""

    block_BF: jax.Array  # index of the block in the row
    tokens_BFW: jax.Array
    confidence_BFW: jax.Array
    stop_BF: jax.Array  # the method's own rule stopped the block


def empty_trace(rows: int, forwards: int, block_length: int) -> Trace:
    """Room for `forwards` forwards of each row."""
    block_BF = jnp.zeros((rows, forwards), jnp.int32)
    tokens_BFW = jnp.zeros((rows, forwards, block_length), jnp.int32)
    return Trace(block_BF, tokens_BFW, jnp.zeros(tokens_BFW.shape, jnp.float32), block_BF > 0)


@struct.dataclass
class Rows:
    tokens_BT: jax.Array  # prompt, finished blocks, masks; the current block is written when it is left
    block: Block
    start_B: jax.Array  # position of the current block; the end, once the row is done
    end_B: jax.Array  # total length
    forwards_B: jax.Array
    cache: KVCache
    trace: Trace | None
    active_experts: jax.Array | None = None  # per sparse layer: experts that a forward ran, summed over the forwards

    @property
    def done_B(self) -> jax.Array:
        return self.start_B >= self.end_B

    @property
    def uncached_B(self) -> jax.Array:
        """Rows whose last forward left a block: it is not yet in the cache."""
        return ~self.done_B & (self.block.step_B == 0) & (self.forwards_B > 0)


def slice_rows(tokens_BT: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """[B, width] tokens of each row from its own start."""
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width))(tokens_BT, start_B)


def record(rows: Rows, block: Block, stopped_B: jax.Array) -> Trace:
    """The trace with the block after this forward, of every row that is not done."""
    W = block.tokens_BW.shape[1]
    row_B = jnp.arange(rows.start_B.shape[0])
    # An index past the end drops the write: rows that are done stay as they are.
    at_B = jnp.where(rows.done_B, rows.trace.block_BF.shape[1], rows.forwards_B)
    return Trace(
        block_BF=rows.trace.block_BF.at[row_B, at_B].set(rows.start_B // W, mode="drop"),
        tokens_BFW=rows.trace.tokens_BFW.at[row_B, at_B].set(block.tokens_BW, mode="drop"),
        confidence_BFW=rows.trace.confidence_BFW.at[row_B, at_B].set(block.confidence_BW, mode="drop"),
        stop_BF=rows.trace.stop_BF.at[row_B, at_B].set(stopped_B, mode="drop"),
    )


def leave_blocks(rows: Rows, block: Block, final_BW: jax.Array, left_B: jax.Array, mask_id: int, eos_id: int) -> Rows:
    """Takes over a step's outcome: rows in `left_B` write `final_BW` and enter the next block, all masks, or are done.

    An EOS in the decoded part of a block fills everything after the block with EOS. Rows that were done stay as they
    are.
    """
    T, W = rows.tokens_BT.shape[1], final_BW.shape[1]
    at_BT = jnp.arange(T)[None] - rows.start_B[:, None]
    own_BT = jnp.take_along_axis(final_BW, jnp.clip(at_BT, 0, W - 1), axis=1)
    written_BT = jnp.where((at_BT >= 0) & (at_BT < W), own_BT, rows.tokens_BT)
    ended_B = jnp.any((final_BW == eos_id) & block.active_BW, axis=1)
    written_BT = jnp.where(ended_B[:, None] & (at_BT >= W), eos_id, written_BT)
    next_B = jnp.where(ended_B, rows.end_B, rows.start_B + W)
    fresh = enter_block(jnp.full_like(final_BW, mask_id), mask_id, block.credit_BWV)

    left, stayed = (written_BT, next_B, fresh), (rows.tokens_BT, rows.start_B, block)
    old, new = (rows.tokens_BT, rows.start_B, rows.block), freeze(left_B, old=left, new=stayed)
    tokens_BT, start_B, block = freeze(rows.done_B, old=old, new=new)
    return rows.replace(tokens_BT=tokens_BT, start_B=start_B, block=block, forwards_B=rows.forwards_B + ~rows.done_B)
