"""Where samples come from: a task that makes them up, or JSONL files; both end as token arrays in memory."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dmax_jax.config import DataConfig
from dmax_jax.data.examples import encode_example, encode_row, read_rows
from dmax_jax.data.tasks import get_task
from dmax_jax.data.tokenizer import Tokenizer
from dmax_jax.errors import InputError

CHUNK = 4096  # rows that one worker encodes at a time


class Source(NamedTuple):
    """A data set of N samples. `dropped` rows of a file were too long to be in it."""

    tokens: np.ndarray  # int32 [N, T]
    prompt_length: np.ndarray  # int32 [N]
    dropped: int


def open_source(data: DataConfig, tokenizer: Tokenizer, seed: int) -> Source:
    """Encodes the data set that a configuration names, `data.workers` processes at once; a task depends on the seed.

    All of it is encoded before the first step: only so is known which rows of a file fit, and afterwards a step costs
    a copy (the text of a step, made and encoded while the GPU waits, took longer than the step).

    Raises InputError for an unknown task, a task that does not fit into `data.sequence_length`, a bad file, and a file
    without a row that fits.
    """
    encode = functools.partial(_encode_rows, tokenizer, data.sequence_length)
    with _mapper(data.workers) as run:
        if data.task:
            get_task(data.task)  # an unknown name fails here, not in a worker
            spans = [(first, min(first + CHUNK, data.samples)) for first in range(0, data.samples, CHUNK)]
            parts = list(run(functools.partial(_encode_task, encode, data.task, seed), spans))
        else:
            rows = read_rows(data.path)
            parts = list(run(encode, [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]))
    source = Source(*(np.concatenate(leaves) for leaves in zip(*(part[:2] for part in parts), strict=True)), 0)
    longest = max(part.longest_dropped for part in parts)
    if longest and (data.task or not len(source.tokens)):
        raise InputError(
            f"data.sequence_length={data.sequence_length} is too short for {data.task or data.path}: a sample needs "
            f"{longest} positions"
        )
    return source._replace(dropped=sum(part.dropped for part in parts))


class _Part(NamedTuple):
    tokens: np.ndarray
    prompt_length: np.ndarray
    dropped: int
    longest_dropped: int  # positions that the longest dropped row needs


def _encode_task(encode, task: str, seed: int, span: tuple[int, int]) -> _Part:
    row = get_task(task).row
    return encode([row(seed, index, "train") for index in range(*span)])


def _encode_rows(tokenizer: Tokenizer, length: int, rows: list[dict[str, Any]]) -> _Part:
    examples = [encode_example(tokenizer, row, length) for row in rows]
    kept = [example for example in examples if example is not None]
    dropped = [row for row, example in zip(rows, examples, strict=True) if example is None]
    return _Part(
        np.array([example.tokens for example in kept], np.int32).reshape(-1, length),
        np.array([example.prompt_length for example in kept], np.int32),
        len(dropped),
        max((sum(map(len, encode_row(tokenizer, row))) + 1 for row in dropped), default=0),
    )


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """`map`, in this process or over worker processes."""
    if not workers:
        yield map
        return
    # Spawned: a fork of a process that runs JAX's threads may hang.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield pool.map
