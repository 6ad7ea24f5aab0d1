"""Files that commands write after long work: checked before it, and written whole or not at all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from dmax_jax.errors import InputError


def prepare_output(name: str, flag: str = "--output") -> pathlib.Path:
    """Makes the directory of a file that is to be written after long work; raises InputError if it can't be written.

    `flag` is the one that names the file.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        raise InputError(f"{flag}={name} is a directory; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}={name}: its directory can't be made: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{flag}={name}: its directory is not writable")
    return path


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[TextIO]:
    """A text file that takes its name only when the block ends without an error; until then it is `NAME.partial`."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
    os.replace(partial, path)


def write_json(path: pathlib.Path, value: Any, *, indent: int | None = None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    with whole_file(path) as file:
        file.write(text + "\n")
