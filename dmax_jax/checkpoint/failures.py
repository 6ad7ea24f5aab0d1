"""What Orbax raises when a disk is full or a checkpoint is corrupt, as errors that a user can act on."""

import contextlib
import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import absl.logging

from dmax_jax.errors import InputError

# Orbax raises a failure, and that is enough: it also logs several tracebacks, and closes its event loop under the other
# reads and writes, which then print theirs, some as late as the garbage collection of their coroutines.
absl.logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _drop_late_io(report: Callable[[Any], object], unraisable: Any) -> None:
    coroutine = getattr(unraisable.object, "cr_code", None)
    if str(unraisable.exc_value) != "Event loop is closed" and "orbax" not in getattr(coroutine, "co_filename", ""):
        report(unraisable)


sys.unraisablehook = functools.partial(_drop_late_io, sys.unraisablehook)


@contextlib.contextmanager
def naming_full_disk(directory: str | pathlib.Path) -> Iterator[None]:
    """Turns the forms in which Orbax and safetensors report a full disk into one InputError."""
    try:
        yield
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        raise InputError(
            f"{directory}: the disk is full; free some space, or keep fewer checkpoints, and start again "
            "(what was saved before is intact)"
        ) from error


@contextlib.contextmanager
def naming_corrupt(directory: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax raises for damaged files and for another tree of arrays into InputError."""
    try:
        yield
    except (RuntimeError, MemoryError):  # a device that is full, say
        raise
    except Exception as error:  # Orbax raises nothing more special
        reason = (str(error.__cause__ or error).splitlines() or [""])[0][:200]
        raise InputError(
            f"{directory}: the checkpoint is corrupt or belongs to another configuration ({reason}); put back a copy, "
            "or remove it to use an older one"
        ) from error
