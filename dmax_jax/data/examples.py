"""Training samples: a row of text becomes a prompt, an answer and padding of a fixed length."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dmax_jax.data.shards import matching_files
from dmax_jax.data.tokenizer import MASK, ROLE_END, Messages, Tokenizer
from dmax_jax.errors import InputError


class Example(NamedTuple):
    """One sample: the prompt, `{answer}<|role_end|>`, then EOS up to the end (at least one)."""

    tokens: np.ndarray  # int32 [T]
    prompt_length: int


def encode_example(tokenizer: Tokenizer, row: dict[str, Any], length: int) -> Example | None:
    """Encodes a row with `question` and `answer`, or with `messages` of which the last is the assistant's.

    Returns None if prompt, target and one EOS exceed `length`; raises InputError for another kind of row, and for a
    row that spells out the mask.
    """
    prompt, target = encode_row(tokenizer, row)
    if len(prompt) + len(target) + 1 > length:
        return None
    tokens = np.full(length, tokenizer.eos_id, np.int32)
    tokens[: len(prompt) + len(target)] = prompt + target
    return Example(tokens, len(prompt))


def encode_row(tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Returns the ids of a row's prompt and of its target, without EOS."""
    prompt, answer = _split(row)
    target = tokenizer.encode(answer + ROLE_END)
    if tokenizer.mask_id in target:
        raise InputError(f"an answer must not contain {MASK}; remove it from: {_describe(row)}")
    return tokenizer.encode_prompt(prompt), target


def _split(row: dict[str, Any]) -> tuple[str | Messages, str]:
    """Returns the prompt, as a question or as messages, and the answer of a row."""
    if isinstance(row, dict):
        question, answer, messages = row.get("question"), row.get("answer"), row.get("messages")
        if isinstance(question, str) and isinstance(answer, str):
            return question, answer
        if _is_conversation(messages):
            return messages[:-1], messages[-1]["content"]
    raise InputError(f"a sample needs question and answer, or messages that end with the assistant's: {_describe(row)}")


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) >= 2
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
        and messages[-1]["role"] == "assistant"
    )


def _describe(row: Any) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."


def read_rows(path: str | pathlib.Path, *, answered: bool = True) -> list[dict[str, Any]]:
    """Reads the samples of a JSONL file, or of all that a glob pattern matches, one file after another in sorted order.

    Empty lines are skipped. With `answered` off, a row may lack its answer. Raises InputError naming file and line if a
    file or shard is missing, there is no sample, or a line is none.
    """
    rows = [row for file in matching_files(path) for row in _read_file(file, answered)]
    if not rows:
        raise InputError(f"{path}: the file is empty; it needs a sample in each line")
    return rows


def _read_file(path: pathlib.Path, answered: bool) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a JSONL file with question and answer, or messages, in each line")
    with path.open("rb") as lines:
        numbered = enumerate(lines, start=1)
        return [_parse(line, f"{path}, line {number}", answered) for number, line in numbered if line.strip()]


def _parse(line: bytes, where: str, answered: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if answered or not (isinstance(row, dict) and isinstance(row.get("question"), str)):
            _split(row)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except ValueError as error:  # bad JSON or bad UTF-8
        raise InputError(f"{where}: no valid JSON ({error})") from None
    return row
