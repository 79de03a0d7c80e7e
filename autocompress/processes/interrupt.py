"""Ctrl-C: once to finish what runs and stop, twice to stop now."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def gentle_interrupt(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """For a ``with`` block, the first Ctrl-C is only noted; the second one raises KeyboardInterrupt.

    Outside the main thread, where Python lets nobody handle signals, and where Ctrl-C is ignored or handled by
    another program's own handler, nothing changes.

    Args:
        say: Is told what happens now, in one sentence.

    Yields:
        Whether Ctrl-C was pressed.
    """
    asked = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True
        say("interrupted: the search ends with what runs now; Ctrl-C again stops it at once")

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        previous = signal.signal(signal.SIGINT, on_interrupt) if ours else None
    except ValueError:  # not in the main thread
        previous = None
    try:
        yield lambda: asked
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
