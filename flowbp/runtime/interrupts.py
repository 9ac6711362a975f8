"""Ctrl-C and SIGTERM: training ends after the step that is under way, whose checkpoint is written first."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from flowbp.runtime.console import is_main

AGAIN = 1.0  # seconds: what comes sooner is the same request, which a launcher passes on to all its processes


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """Raise KeyboardInterrupt, which holds the signal's number."""
    raise KeyboardInterrupt(number)


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell expects of a program that `interrupt`, or Python's own handler of Ctrl-C, ended."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextmanager
def heard_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` hear Ctrl-C and SIGTERM during the block, in the main thread; one that is ignored stays so."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stop:
    """The request to stop, if there was one. number: of its signal, or 0."""

    def __init__(self):
        self.number, self.since = 0, 0.0

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """Keep the request for the end of the step; a second one interrupts at once."""
        if self.number and time.monotonic() - self.since > AGAIN:
            interrupt(number)
        if not self.number:
            self.number, self.since = number, time.monotonic()
            if is_main():
                os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be under way
