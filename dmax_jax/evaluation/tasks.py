"""Evaluation sets: the test split of a task that generates its data, or a JSONL file such as GSM8K's."""

import dataclasses

from dmax_jax.data.examples import read_rows
from dmax_jax.data.tasks import get_task
from dmax_jax.decoding.batch import Answer
from dmax_jax.errors import InputError
from dmax_jax.evaluation.answers import Sample, extract

GENERATED_SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question and the integer that answers it."""

    index: int
    question: str
    expected: int


def load_problems(task: str, samples: int | None = None, seed: int = 0) -> list[Problem]:
    """Returns the first `samples` problems of a set.

    `task` is a generator's name (by default 1000 problems of its test split, drawn from `seed`), or a file that ends in
    .jsonl (by default all of it). Raises InputError for an unknown task, a bad file, a reference without `#### N`.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples={samples} must be at least 1")
    if seed < 0:
        raise InputError(f"test_seed={seed} must not be negative")
    if task.endswith(".jsonl"):
        rows = read_rows(task)[:samples]
    else:
        row = get_task(task).row
        rows = [row(seed, index, "test") for index in range(samples or GENERATED_SAMPLES)]
    return [_problem(task, index, row) for index, row in enumerate(rows)]


def _problem(task: str, index: int, row: dict) -> Problem:
    expected = extract(row["answer"]) if "question" in row else None
    if expected is None:
        raise InputError(f"{task}, sample {index + 1}: evaluation needs question, and answer that ends with #### N")
    return Problem(index, row["question"], expected)


def score(problem: Problem, answer: Answer, text: str) -> Sample:
    """Compares an answer, whose text up to the end token is `text`, with the reference: strict exact match."""
    extracted = extract(text)
    return Sample(
        index=problem.index,
        correct=extracted == problem.expected,
        extracted=extracted,
        expected=problem.expected,
        finished=answer.generated_tokens < len(answer.token_ids),
        generated_tokens=answer.generated_tokens,
        forwards=answer.forwards,
        text=text,
    )
