"""Ctrl-C: once to stop after the running trials, twice to stop at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from types import FrameType

NOTE = "interrupted: the search ends with what runs now; Ctrl-C again stops it at once"


@contextmanager
def gentle_interrupt(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Within a ``with`` block, the first Ctrl-C is only recorded; the second raises KeyboardInterrupt.

    It has no effect outside the main thread, where Python allows no signal handlers, or if Ctrl-C is ignored or
    has a handler other than Python's default.

    Args:
        say: Called at the first Ctrl-C, in a thread of its own, with a sentence on what happens now.

    Yields:
        A function that returns whether Ctrl-C was pressed.
    """
    asked = False

    def tell() -> None:
        with suppress(OSError):  # the terminal may be gone
            say(NOTE)

    teller = Thread(target=tell, daemon=True)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True
        teller.start()  # the interrupted thread may be in the middle of a print, which is not reentrant

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
        if asked:
            teller.join()
