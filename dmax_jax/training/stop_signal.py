"""Ctrl-C and a cluster's SIGTERM as a flag that the training loop looks at between steps."""

import signal
from types import FrameType


class StopSignal:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second one acts as usual."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __exit__(self, *_) -> None:
        self._restore()
