"""Times the generate loop on weights of any kind, and says what the memory would allow."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from dmax_jax.config import ModelConfig
from dmax_jax.decoding.generate import Generation, Geometry, generate_for
from dmax_jax.decoding.policies import SpdPolicy
from dmax_jax.errors import InputError
from dmax_jax.model.params import Moe, Params
from dmax_jax.sharding import mesh_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeProblem:
    """What is decoded: rows of `context` random tokens, then blocks that take a fixed number of forwards each."""

    batch_size: int = 1
    block_length: int = 32
    context: int = 512  # positions before the first block
    blocks: int = 8  # whose forwards are timed
    steps_per_block: int = 5
    repeats: int = 5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name}={getattr(self, field.name)} must be at least 1")
        if self.steps_per_block > self.block_length:
            raise InputError(
                f"steps_per_block={self.steps_per_block}: a block of {self.block_length} has at most as many forwards"
            )
        if self.context % self.block_length:
            raise InputError(f"context={self.context} is no multiple of block_length={self.block_length}")

    @property
    def forwards(self) -> int:
        """Forwards that are timed in every repeat."""
        return self.blocks * self.steps_per_block

    @property
    def mean_context(self) -> float:
        """Positions before the block, mean over the timed forwards: those of all blocks but the first."""
        return self.context + self.block_length * (self.blocks + 1) / 2


@dataclasses.dataclass(frozen=True)
class DecodeTimes:
    """What was measured; times are medians over the repeats."""

    ms_per_forward: float
    slowest_ms_per_forward: float  # of the repeats
    prefill_ms: float
    compile_seconds: float
    active_experts: list[float]  # per sparse layer, mean over the timed forwards
    same_tokens: bool  # in all repeats
    bytes_left_over: int | None  # of one device's memory, in use after the last repeat and not after the first
    peak_bytes: int | None  # of one device, weights included; None, like the other, where the backend doesn't say


@dataclasses.dataclass(frozen=True)
class RequiredBytes:
    """What one forward has to read at least, from all devices together: everything once."""

    experts: float  # those that some position chose
    other_weights: float
    head: float
    cache: float

    @property
    def total(self) -> float:
        return self.experts + self.other_weights + self.head + self.cache


def time_decoding(
    params: Params, config: ModelConfig, problem: DecodeProblem, *, trace_directory: str | None = None
) -> DecodeTimes:
    """Times `generate` on random prompts.

    One program decodes one block and then, called again, all of them: the difference of the times over that of the
    forwards is the time of a forward (one in `steps_per_block` also carries the block before it), and what is left of
    the shorter call is the prefill. With a `trace_directory`, one more call of all blocks leaves a trace there.
    """
    start = time.perf_counter()
    run = compile_decoding(params, config, problem)
    compile_seconds = time.perf_counter() - start
    few, many = 1, 1 + problem.blocks
    seconds, tokens, in_use = {few: [], many: []}, {few: [], many: []}, []
    for _ in range(1 + problem.repeats):  # the first is a warm-up
        for blocks in (few, many):
            start = time.perf_counter()
            generation = jax.block_until_ready(run(blocks))
            seconds[blocks].append(time.perf_counter() - start)
            tokens[blocks].append(np.asarray(generation.tokens_BT))
            del generation
        in_use.append(memory_of(params).get("bytes_in_use"))
    if trace_directory:
        with jax.profiler.trace(trace_directory):
            jax.block_until_ready(run(many))
    short, long = (times[1:] for times in seconds.values())
    per_forward = [(all_blocks - one) / problem.forwards for one, all_blocks in zip(short, long, strict=True)]
    ms_per_forward = 1e3 * statistics.median(per_forward)
    return DecodeTimes(
        ms_per_forward=ms_per_forward,
        slowest_ms_per_forward=1e3 * max(per_forward),
        prefill_ms=1e3 * statistics.median(short) - problem.steps_per_block * ms_per_forward,
        compile_seconds=compile_seconds,
        active_experts=mean_active_experts(params, config, problem),
        same_tokens=all(np.array_equal(again, same[0]) for same in tokens.values() for again in same),
        bytes_left_over=None if in_use[0] is None else in_use[-1] - in_use[0],
        peak_bytes=memory_of(params).get("peak_bytes_in_use"),
    )


def memory_of(params: Params) -> dict[str, int]:
    """What one of the devices says of its memory; nothing on a CPU."""
    return next(iter(params.embed.devices())).memory_stats() or {}


def compile_decoding(
    params: Params, config: ModelConfig, problem: DecodeProblem, *, count_experts: bool = False
) -> Callable[[int], Generation]:
    """The compiled generate loop on the problem's prompts, as a function of the number of blocks."""
    W, B = problem.block_length, problem.batch_size
    prompt_BP = np.zeros((B, problem.context + W), np.int32)
    prompt_BP[:, :-W] = np.random.default_rng(0).integers(0, config.vocab_size - 1, (B, problem.context))
    prompt_BP += prompt_BP >= config.mask_token_id  # any token but the mask
    arguments = (params, prompt_BP, np.full(B, problem.context, np.int32), jax.random.split(jax.random.key(0), B))
    dynamic = {
        "policy": SpdPolicy(stop="never", max_steps=problem.steps_per_block),
        "mask_id": np.int32(config.mask_token_id),
        "eos_id": np.int32(-1),  # no token: no answer ends before its length
    }
    static = {
        "geometry": Geometry(prefill=problem.context, block_length=W, blocks=1 + problem.blocks),
        "config": config,
        "count_experts": count_experts,
        "mesh": mesh_of(params.embed),
    }
    compiled = generate_for(params, B, W).lower(*arguments, gen_length=np.int32(W), **dynamic, **static).compile()
    return lambda blocks: compiled(*arguments, gen_length=np.int32(W * blocks), **dynamic)


def mean_active_experts(params: Params, config: ModelConfig, problem: DecodeProblem) -> list[float]:
    """Experts that a timed forward runs, per sparse layer."""
    run = compile_decoding(params, config, problem, count_experts=True)
    first, all_blocks = (jax.device_get(run(blocks).active_experts) for blocks in (1, 1 + problem.blocks))
    return ((all_blocks - first) / problem.forwards).tolist()


def required_bytes(
    params: Params, config: ModelConfig, problem: DecodeProblem, active_experts: list[float]
) -> RequiredBytes:
    """What a timed forward reads if it reads nothing twice; `active_experts` are those per sparse layer."""
    sparse = [layer.mlp for layer in params.layers if isinstance(layer.mlp, Moe)]
    one_expert = [_bytes(mlp.experts) / config.num_experts for mlp in sparse]
    position = 2 * config.num_key_value_heads * config.head_dim * params.embed.dtype.itemsize
    return RequiredBytes(
        experts=sum(active * size for active, size in zip(active_experts, one_expert, strict=True)),
        other_weights=_bytes(params.layers) - config.num_experts * sum(one_expert) + params.norm.nbytes,
        head=_bytes(params.head),
        cache=problem.batch_size * problem.mean_context * config.num_hidden_layers * position,
    )


def _bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
