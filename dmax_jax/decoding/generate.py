"""The whole generation of a batch as one function: prefill, then one loop of forwards over all rows."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import io_callback
from jax.sharding import Mesh

from dmax_jax.config import ModelConfig
from dmax_jax.decoding.baselines import add_credit, hierarchical_step, threshold_step
from dmax_jax.decoding.block import Block, enter_block, freeze
from dmax_jax.decoding.policies import CreditPolicy, HierarchicalPolicy, Policy, SpdPolicy, ThresholdPolicy
from dmax_jax.decoding.prediction import Prediction, predict
from dmax_jax.decoding.rows import Rows, Trace, empty_trace, leave_blocks, record, slice_rows
from dmax_jax.decoding.spd import embed_softly, spd_step
from dmax_jax.determinism import compiler_options
from dmax_jax.kernels.hopper import has_hopper
from dmax_jax.kernels.program import overlapping
from dmax_jax.kernels.projection import MAX_ROWS
from dmax_jax.model.cache import TILE, empty_cache, write_cache
from dmax_jax.model.masks import CachedBlocks, block_causal_mask
from dmax_jax.model.params import Params
from dmax_jax.model.shares import is_first_share, run_on_shares
from dmax_jax.model.transformer import embed, transformer, unembed

STEPS = {
    SpdPolicy: spd_step,
    ThresholdPolicy: threshold_step,
    HierarchicalPolicy: hierarchical_step,
    CreditPolicy: threshold_step,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Static sizes of a generation: prefilled positions Q (a multiple of the block length) and block counts."""

    prefill: int
    block_length: int
    blocks: int  # that a row may decode, its prompt's tail included

    @property
    def total(self) -> int:
        return self.prefill + self.blocks * self.block_length


@struct.dataclass
class Generation:
    tokens_BT: jax.Array
    total_B: jax.Array  # length of each row: its prompt and answer in whole blocks
    forwards_B: jax.Array  # forwards over blocks; the prefill is not counted
    trace: Trace | None
    active_experts: jax.Array | None  # per sparse layer: experts that a forward ran, summed over the forwards


STATIC = ("geometry", "config", "trace", "count_experts", "on_blocks", "mesh", "overlap")
BlockListener = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # left_B, start_B and tokens_BW of a forward


@functools.partial(jax.jit, static_argnames=STATIC)
def generate(
    params: Params,
    prompt_BP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    *,
    gen_length: int | jax.Array,
    geometry: Geometry,
    policy: Policy,
    config: ModelConfig,
    mask_id: int | jax.Array,
    eos_id: int | jax.Array,
    trace: bool = False,
    count_experts: bool = False,
    on_blocks: BlockListener | None = None,
    mesh: Mesh | None = None,
    overlap: bool = False,
) -> Generation:
    """Decodes every row's answer of `gen_length` tokens, rounded up to whole blocks (paper, section 3.3).

    `prompt_BP` is padded to P = geometry.prefill + block_length; a row of length 0 is padding and decodes nothing. The
    outcome of a row depends on its own prompt and key alone. `on_blocks` is called on the host after every forward in
    which a row has left its block, with what that block holds; the calls may come late, but never before its tokens.
    With a `mesh`, every one of its devices does it all with its share of the model. With `overlap`, kernels start while
    those before them end (kernels/program.py), which must then be left out of CUDA graphs.
    """
    static = {"geometry": geometry, "trace": trace, "count_experts": count_experts, "on_blocks": on_blocks}
    decode = functools.partial(decode_rows, **static, overlap=overlap)
    dynamic = prompt_BP, length_B, keys_B, gen_length, policy, mask_id, eos_id
    if mesh is None:
        return decode(params, config, *dynamic)
    return run_on_shares(decode, params, config, mesh, *dynamic)


def generate_for(
    params: Params, batch_size: int, block_length: int, *, deterministic: bool = False
) -> Callable[..., Generation]:
    """`generate`, compiled in the way that is the fastest for this model and so many rows."""
    positions = 2 * batch_size * block_length  # of a forward that carries finished blocks, too
    are_few = positions <= MAX_ROWS  # of more, XLA makes many of a layer's programs
    is_bfloat16 = params.head.dtype == jnp.bfloat16  # in 8 bits, the host is not far enough ahead
    is_alone = len(params.embed.devices()) == 1  # kernels of several devices wait for each other: some never ended
    return _compiled(has_hopper() and are_few and is_bfloat16 and is_alone, deterministic)


@functools.cache
def _compiled(overlap: bool, deterministic: bool) -> Callable[..., Generation]:
    options = compiler_options(deterministic)
    if overlap:  # in a CUDA graph, no kernel starts before the one before it has ended
        options["xla_gpu_enable_command_buffer"] = "FUSION,CUBLAS,CUBLASLT,CUDNN,DYNAMIC_SLICE_FUSION"
    if not options:
        return generate
    function = functools.partial(generate.__wrapped__, overlap=overlap)
    return jax.jit(function, static_argnames=STATIC, compiler_options=options)


def decode_rows(
    params: Params,
    config: ModelConfig,
    prompt_BP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    gen_length: jax.Array,
    policy: Policy,
    mask_id: jax.Array,
    eos_id: jax.Array,
    *,
    geometry: Geometry,
    trace: bool,
    count_experts: bool,
    on_blocks: BlockListener | None,
    overlap: bool,
) -> Generation:
    """`generate` on one device, or on one of those that share the model."""

    def step(rows: Rows, commit: bool) -> Rows:
        x_BWD = embed_block(params, rows.block, policy, mask_id)
        logits_BWV, rows = forward_blocks(params, rows, x_BWD, config, commit=commit)
        new = decode_step(rows, logits_BWV, keys_B, policy, mask_id, eos_id)
        if on_blocks is not None:
            tell(on_blocks, rows, new)
        return new

    def must_commit(rows: Rows) -> jax.Array:
        return jnp.any(rows.uncached_B)

    def unfinished(rows: Rows) -> jax.Array:
        return ~jnp.all(rows.done_B)

    def refine_until_one_leaves(rows: Rows) -> Rows:
        rows = step(rows, commit=True)
        return jax.lax.while_loop(
            lambda rows: unfinished(rows) & ~must_commit(rows), functools.partial(step, commit=False), rows
        )

    rows = prefill(params, prompt_BP, length_B, gen_length, geometry, policy, config, mask_id, trace)
    if count_experts:
        sparse_layers = config.num_hidden_layers - config.first_k_dense_replace
        rows = rows.replace(active_experts=jnp.zeros(sparse_layers, jnp.int32))
    with overlapping() if overlap else contextlib.nullcontext():
        rows = jax.lax.while_loop(unfinished, refine_until_one_leaves, rows)
    return Generation(rows.tokens_BT, rows.end_B, rows.forwards_B, rows.trace, rows.active_experts)


def prefill(params, prompt_BP, length_B, gen_length, geometry, policy, config, mask_id, trace) -> Rows:
    """Caches the whole blocks of every prompt in one forward and enters the block that holds the prompt's tail."""
    B, P = prompt_BP.shape
    Q, W, T = geometry.prefill, geometry.block_length, geometry.total
    tokens_BT = jnp.pad(prompt_BP, ((0, 0), (0, T - P)))
    tokens_BT = jnp.where(jnp.arange(T)[None] < length_B[:, None], tokens_BT, mask_id)
    cache = empty_cache(config, B, -(-T // TILE) * TILE, params.embed.dtype)
    if Q:
        x_BQD, positions = embed(params, tokens_BT[:, :Q]), jnp.arange(Q)[None]
        kv = transformer(params, x_BQD, positions, block_causal_mask(Q, W), config).kv
        cache = write_cache(cache, kv, jnp.zeros_like(length_B), jnp.ones_like(length_B, bool))
    start_B = length_B // W * W
    credit_BWV = jnp.zeros((B, W, params.head.shape[0])) if isinstance(policy, CreditPolicy) else None
    return Rows(
        tokens_BT=tokens_BT,
        block=enter_block(slice_rows(tokens_BT, start_B, W), mask_id, credit_BWV),
        start_B=start_B,
        end_B=jnp.where(length_B == 0, 0, -(-(length_B + gen_length) // W) * W),
        forwards_B=jnp.zeros_like(length_B),
        cache=cache,
        trace=empty_trace(B, geometry.blocks * W, W) if trace else None,
    )


def embed_block(params: Params, block: Block, policy: Policy, mask_id: int) -> jax.Array:
    """Input of the block's next forward: [B, W, D]."""
    if isinstance(policy, SpdPolicy):
        return embed_softly(block, functools.partial(embed, params), policy, mask_id)
    return embed(params, block.tokens_BW)


def forward_blocks(
    params: Params, rows: Rows, x_BTD: jax.Array, config: ModelConfig, *, commit: bool
) -> tuple[jax.Array, Rows]:
    """Logits [B, W, V] of every row's block, of input `x_BTD`, which sees all earlier blocks.

    With `commit` the forward also carries the block before it, from its final hard tokens, and writes its keys and
    values into the cache: committing a finished block costs no forward of its own. Without, all must be committed.
    """
    W = x_BTD.shape[1]
    own_BW = rows.start_B[:, None] + jnp.arange(W)[None]
    positions_BT, cached_B, pending_B = own_BW, rows.start_B, jnp.zeros(len(own_BW), bool)
    if commit:
        pending_B = rows.uncached_B
        cached_B = rows.start_B - jnp.where(pending_B, W, 0)
        previous_BW = slice_rows(rows.tokens_BT, jnp.maximum(cached_B, 0), W)
        x_BTD = jnp.concatenate([embed(params, previous_BW), x_BTD], axis=1)
        positions_BT = jnp.concatenate([own_BW - W, own_BW], axis=1)
    visible = CachedBlocks(cached_B, pending_B, W)
    out = transformer(params, x_BTD, positions_BT, visible, config, cache=rows.cache)
    if rows.active_experts is not None:
        active = jnp.asarray([jnp.sum(load_E > 0) for load_E in out.loads], jnp.int32)
        rows = rows.replace(active_experts=rows.active_experts + active)
    if commit:
        finished = jax.tree.map(lambda new: new[:, :W], out.kv)
        rows = rows.replace(cache=write_cache(rows.cache, finished, cached_B, pending_B))
    return unembed(params, out.hidden_BTD[:, -W:]), rows


def decode_step(rows: Rows, logits_BWV, keys_B, policy: Policy, mask_id: int, eos_id: int) -> Rows:
    """One step of the policy on every row's block; a block is left when it has stopped or has had all its forwards."""
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, rows.forwards_B)
    block, prediction = read_logits(rows.block, logits_BWV, step_keys_B, policy, mask_id)
    block, stopped_B = STEPS[type(policy)](block, prediction, policy, mask_id)
    block = block.replace(step_B=block.step_B + 1)
    W = block.tokens_BW.shape[1]
    most = W if policy.max_steps is None else jnp.minimum(W, policy.max_steps)
    left_B = stopped_B | (block.step_B >= most)
    final_BW = block.tokens_BW
    if policy.fill_leftover_masks:
        final_BW = jnp.where(block.active_BW & (final_BW == mask_id), prediction.others_BW, final_BW)
    if rows.trace is not None:
        shown = block.replace(tokens_BW=freeze(left_B, old=final_BW, new=block.tokens_BW))
        rows = rows.replace(trace=record(rows, shown, stopped_B))
    return leave_blocks(rows, block, final_BW, left_B, mask_id, eos_id)


def read_logits(block: Block, logits_BWV, keys_B, policy: Policy, mask_id: int) -> tuple[Block, Prediction]:
    """What a forward predicts; with the credit method, after the logits have been raised by what was predicted."""
    if not isinstance(policy, CreditPolicy):
        return block, predict(logits_BWV, mask_id, policy.temperature, keys_B)
    plain = predict(logits_BWV, mask_id)
    block, raised_BWV = add_credit(block, logits_BWV, plain, policy, mask_id)
    return block, predict(raised_BWV, mask_id, policy.temperature, keys_B).replace(others_BW=plain.others_BW)


def tell(on_blocks: BlockListener, old: Rows, new: Rows) -> None:
    """Calls the listener if a row has left its block between two states."""
    left_B = new.start_B != old.start_B
    tokens_BW = slice_rows(new.tokens_BT, old.start_B, old.block.tokens_BW.shape[1])

    def call() -> None:
        io_callback(on_blocks, None, left_B, old.start_B, tokens_BW)

    jax.lax.cond(jnp.any(left_B) & is_first_share(), call, lambda: None)
