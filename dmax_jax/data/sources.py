"""Where samples come from: a task that makes them up, or a JSONL file."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dmax_jax.config import DataConfig
from dmax_jax.data.examples import Example, encode_example, encode_row, read_rows
from dmax_jax.data.tasks import get_task
from dmax_jax.data.tokenizer import Tokenizer
from dmax_jax.errors import InputError


class Source(NamedTuple):
    """A data set: `example(index)` for every index below `samples`; `dropped` rows were too long to be in it."""

    example: Callable[[int], Example]
    samples: int
    dropped: int


def open_source(data: DataConfig, tokenizer: Tokenizer, seed: int) -> Source:
    """Opens the data set that a configuration names; a task's samples depend on the seed.

    Raises InputError for an unknown task, a bad file, or a file without a row that fits into `data.sequence_length`.
    """
    if not data.task:
        return _open_file(data.path, tokenizer, data.sequence_length)
    row = functools.partial(get_task(data.task).row, seed)
    return Source(functools.partial(_task_example, tokenizer, row, data.sequence_length), data.samples, 0)


def _task_example(tokenizer: Tokenizer, row: Callable[[int, str], dict], length: int, index: int) -> Example:
    sample = row(index, "train")
    example = encode_example(tokenizer, sample, length)
    if example is None:
        needed = sum(map(len, encode_row(tokenizer, sample))) + 1
        raise InputError(f"data.sequence_length={length} is too short for the task: sample {index} needs {needed}")
    return example


def _open_file(path: str, tokenizer: Tokenizer, length: int) -> Source:
    """Encodes a whole file at once: only so is known which rows fit, and later steps cost nothing."""
    rows = read_rows(path)
    tokens = np.empty((len(rows), length), np.int32)
    prompt_lengths = []
    for row in rows:
        example = encode_example(tokenizer, row, length)
        if example is not None:
            tokens[len(prompt_lengths)] = example.tokens
            prompt_lengths.append(example.prompt_length)
    samples = len(prompt_lengths)
    if not samples:
        raise InputError(f"{path}: no row fits into data.sequence_length={length}; raise it")
    return Source(lambda index: Example(tokens[index], prompt_lengths[index]), samples, len(rows) - samples)
