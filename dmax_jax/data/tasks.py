"""The tasks that generate their own data, by name."""

import dataclasses
from collections.abc import Callable

from dmax_jax.data.stories import story
from dmax_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Task:
    """A named generator: `row(seed, index, split)` returns a dict with `question` and `answer`, the same each time."""

    name: str
    row: Callable[[int, int, str], dict[str, str]]


TASKS = {task.name: task for task in (Task("stories", story),)}


def get_task(name: str) -> Task:
    """Returns a task; raises InputError if there is none of that name."""
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; known tasks: {', '.join(TASKS)}")
    return TASKS[name]
