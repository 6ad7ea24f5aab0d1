"""Output directories that exist complete or not at all, and the files that travel with a model."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from dmax_jax.errors import InputError

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
# Also the card, the licence, and the official model code that `auto_map` in config.json points to.
COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "configuration_*.py",
    "modeling_*.py",
)


@contextlib.contextmanager
def new_directory(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path` that takes its place at the end, or vanishes if the body raises.

    Raises InputError if `path` exists and is anything but an empty directory.
    """
    require_free(path)
    path = pathlib.Path(path).absolute()
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_free(path: str | pathlib.Path) -> None:
    """Raises InputError if `path` exists and is anything but an empty directory."""
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty directory; choose another one or remove it")


def copy_companions(
    source: str | pathlib.Path, destination: str | pathlib.Path, patterns: tuple[str, ...] = COMPANIONS
) -> None:
    """Copies the files of a model directory that are neither weights nor config: tokenizer, template, licence, code."""
    for pattern in patterns:
        for file in sorted(pathlib.Path(source).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, pathlib.Path(destination) / file.name)
