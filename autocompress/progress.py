"""Progress of long work: the code that does it reports, a listener such as the terminal's display shows it.

A report is the completed fraction, between 0 and 1, of the innermost `span`. Without a listener, as in a worker
process, a report costs one look at a variable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[float], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(done: float) -> None:
    """Reports that the fraction ``done``, between 0 and 1, of the current `span` is completed."""
    listener = _listener.get()
    if listener is not None:
        listener(done)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Sends the reports of a ``with`` block, in this thread, to ``listener``; discards them if it is None."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def span(begin: float, end: float) -> Iterator[None]:
    """Maps the reports of a ``with`` block to the part from ``begin`` to ``end`` of the enclosing span."""
    outer = _listener.get()
    with heard_by(outer and (lambda done: outer(begin + (end - begin) * done))):
        yield
    report(end)
