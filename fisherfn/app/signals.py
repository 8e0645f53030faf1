"""Ctrl-C and SIGTERM as one exception, with the exit code a shell expects."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Someone asked the run to stop. Not an `Exception`: nothing on the way may swallow it."""

    def __init__(self, code: int) -> None:
        """Remember the exit code: 128 and the number of the signal."""
        super().__init__(code)
        self.code = code


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` inside the block when SIGINT or SIGTERM arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may have handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
