"""Prompts in, answers out: buckets, batches, timing, and what a finished row says."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dmax_jax.config import ModelConfig
from dmax_jax.decoding.generate import Generation, Geometry, generate_for
from dmax_jax.decoding.policies import Policy
from dmax_jax.errors import InputError
from dmax_jax.model.params import Params
from dmax_jax.sharding import mesh_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """Everything but the policy; ids default to the model's own."""

    gen_length: int = 256  # answer tokens, rounded up to whole blocks
    block_length: int = 32
    batch_size: int = 1
    seed: int = 0
    mask_id: int | None = None
    eos_id: int | None = None
    trace: bool = False
    deterministic: bool = False  # the same answers from every start on GPUs of a kind

    def __post_init__(self):
        for name in ("gen_length", "block_length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed} must not be negative")


def progress_by_batch(batch_size: int) -> dict[str, float]:
    """Settings of a `tqdm` over answers, which come a batch at a time: it is drawn after each."""
    return {"miniters": batch_size, "mininterval": 0, "smoothing": 0}


@dataclasses.dataclass(frozen=True)
class Step:
    """A block after one forward."""

    block: int
    step: int
    token_ids: list[int]
    stop: bool
    confidences: list[float]  # probability of each position's prediction


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was decoded for one prompt; `seconds` is its whole batch's time, prefill included, compilation excluded."""

    prompt_ids: list[int]
    token_ids: list[int]  # everything after the prompt up to the total length, filled with EOS
    generated_tokens: int  # before the first EOS
    forwards: int  # over blocks; the prefill is not counted
    seconds: float
    trace: list[Step] | None

    @property
    def answer_ids(self) -> list[int]:
        """The tokens before the first EOS."""
        return self.token_ids[: self.generated_tokens]

    @property
    def tpf(self) -> float:
        """Tokens per forward, the prefill counted as one forward (as the official code does)."""
        return self.generated_tokens / (self.forwards + 1)

    @property
    def tps(self) -> float:
        return self.generated_tokens / self.seconds


def decode_prompts(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    settings: DecodeSettings,
    *,
    first_index: int = 0,
    on_block: Callable[[int, int, list[int]], None] | None = None,
) -> Iterator[Answer]:
    """Yields the answer to every prompt, in order, `settings.batch_size` at a time.

    A prompt's noise depends on the seed and its index alone. `first_index` is that of the first prompt, if these are
    the rest of more prompts: after whole batches, the same batches follow as if all were given. `on_block` hears of
    every block as soon as it is left: the prompt's index, the position of the block, and its tokens, of which the first
    may be the prompt's; listening compiles each batch anew. Raises InputError for a prompt that can't be decoded.
    """
    for index, prompt in enumerate(prompts, first_index):
        check_prompt(prompt, index, config, settings)
    size = min(settings.batch_size, first_index + len(prompts))
    for first in range(0, len(prompts), size or 1):
        batch = prompts[first : first + size]
        yield from _decode_batch(params, config, batch, first_index + first, size, policy, settings, on_block)


def check_prompt(prompt: Sequence[int], index: int, config: ModelConfig, settings: DecodeSettings) -> None:
    """Raises InputError for a prompt that is empty, too long, or has ids that a prompt can't have."""
    mask_id = config.mask_token_id if settings.mask_id is None else settings.mask_id
    if not len(prompt):
        raise InputError(f"prompt {index} is empty")
    bad = [token for token in prompt if not 0 <= token < config.vocab_size]
    if bad:
        raise InputError(f"prompt {index} has id {bad[0]}, outside the vocabulary of {config.vocab_size}")
    if mask_id in prompt:
        raise InputError(f"prompt {index} has the mask id {mask_id}; masks are what is to be decoded")
    total = -(-(len(prompt) + settings.gen_length) // settings.block_length) * settings.block_length
    if total > config.max_position_embeddings:
        raise InputError(
            f"prompt {index} of {len(prompt)} tokens with gen_length={settings.gen_length} needs {total} positions in "
            f"whole blocks; the model has {config.max_position_embeddings}: shorten the prompt or gen_length"
        )


def prefill_bucket(length: int, block_length: int) -> int:
    """Positions to prefill for the longest prompt of a batch: its whole blocks, rounded up to a power of two."""
    blocks = length // block_length
    return block_length * (1 << (blocks - 1).bit_length() if blocks else 0)


def _decode_batch(
    params, config, prompts, first: int, size: int, policy, settings: DecodeSettings, on_block
) -> Iterator[Answer]:
    W = settings.block_length
    geometry = Geometry(
        prefill=prefill_bucket(max(map(len, prompts)), W), block_length=W, blocks=1 + -(-settings.gen_length // W)
    )
    prompt_BP = np.zeros((size, geometry.prefill + W), np.int32)
    for row, prompt in enumerate(prompts):
        prompt_BP[row, : len(prompt)] = prompt
    length_B = np.zeros(size, np.int32)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(settings.seed), first + np.arange(size))
    eos_id = np.int32(config.eos_token_id if settings.eos_id is None else settings.eos_id)
    dynamic = {
        "gen_length": np.int32(settings.gen_length),
        "policy": policy,
        "mask_id": np.int32(config.mask_token_id if settings.mask_id is None else settings.mask_id),
        "eos_id": eos_id,
    }
    on_blocks = None if on_block is None else functools.partial(_tell_rows, on_block, first)
    mesh = mesh_of(params.embed)
    static = {"geometry": geometry, "config": config, "trace": settings.trace, "on_blocks": on_blocks, "mesh": mesh}
    # Compiled ahead, so that the time below is decoding alone; a known shape comes from jit's own cache.
    function = generate_for(params, size, W, deterministic=settings.deterministic)
    compiled = function.lower(params, prompt_BP, length_B, keys_B, **dynamic, **static).compile()
    start = time.perf_counter()
    generation = jax.block_until_ready(compiled(params, prompt_BP, length_B, keys_B, **dynamic))
    seconds = time.perf_counter() - start
    jax.effects_barrier()  # every block has been told of
    generation = jax.device_get(generation)
    for row, prompt in enumerate(prompts):
        yield _answer(generation, row, prompt, int(eos_id), seconds)


def _tell_rows(on_block, first: int, left_B, start_B, tokens_BW) -> None:
    for row in np.flatnonzero(left_B):
        on_block(first + int(row), int(start_B[row]), np.asarray(tokens_BW[row]).tolist())


def _answer(generation: Generation, row: int, prompt: Sequence[int], eos_id: int, seconds: float) -> Answer:
    token_ids = generation.tokens_BT[row, len(prompt) : generation.total_B[row]].tolist()
    forwards = int(generation.forwards_B[row])
    return Answer(
        prompt_ids=list(prompt),
        token_ids=token_ids,
        generated_tokens=token_ids.index(eos_id) if eos_id in token_ids else len(token_ids),
        forwards=forwards,
        seconds=seconds,
        trace=None if generation.trace is None else _steps(generation, row, forwards),
    )


def _steps(generation: Generation, row: int, forwards: int) -> list[Step]:
    steps = []
    for forward in range(forwards):
        block = int(generation.trace.block_BF[row, forward])
        number = steps[-1].step + 1 if steps and steps[-1].block == block else 0
        tokens = generation.trace.tokens_BFW[row, forward].tolist()
        confidences = generation.trace.confidence_BFW[row, forward].tolist()
        steps.append(Step(block, number, tokens, bool(generation.trace.stop_BF[row, forward]), confidences))
    return steps
