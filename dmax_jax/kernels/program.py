"""A kernel as a program on the device: compiled once for all layers, and started while the one before it ends.

Where `overlapping`, a kernel's blocks of threads may stand ready, their weights on their way, before the program before
has ended ("programmatic dependent launch"). Each lets the next one start only after it has waited itself. So what the
last kernel has waited for is complete when the next one starts, and that alone may be read before waiting: weights.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_overlapping = contextvars.ContextVar("overlapping", default=False)


@contextlib.contextmanager
def overlapping() -> Iterator[None]:
    """Kernels that are traced within, for one device, start before the program before them has ended.

    For a loop whose weights come from outside: what a program makes just before could be read too early. XLA must
    not put the kernels into CUDA graphs, where each of them waits for the one before.
    """
    token = _overlapping.set(True)
    try:
        yield
    finally:
        _overlapping.reset(token)


def is_overlapping() -> bool:
    return _overlapping.get()


def kernel(*settings: str):
    """Decorates a function around a kernel: with the same settings and shapes it is lowered and compiled once.

    Without that, every layer would have one of its own. `settings` are static arguments, beside `interpret` and
    `overlap`, whether it starts early, which is not given by callers.
    """

    def decorate(function):
        compiled = jax.jit(function, static_argnames=(*settings, "interpret", "overlap"))

        @functools.wraps(function)
        def call(*arguments, **named):
            return compiled(*arguments, **named, overlap=is_overlapping() and not named.get("interpret"))

        call.clear_cache = compiled.clear_cache
        return call

    return decorate


def wait_for_earlier(overlap: bool) -> None:
    """Within a kernel that starts early: waits until all programs before it have ended.

    Every block of threads has to, and every warpgroup that reads or writes global memory, before it does.
    """
    if overlap:
        plgpu.griddepcontrol_wait()


def start_next(overlap: bool) -> None:
    """Lets the next program start, once every block of threads has called this or ended.

    Only after `wait_for_earlier`. A next program that fetches weights at once should start when this one has on its way
    what it needs itself.
    """
    if overlap:
        plgpu.griddepcontrol_launch_dependents()
