"""How far what takes time has come: reported from where the work is done, heard by whoever shows it.

A report is a share between 0 and 1 of the innermost `span`. Where nobody listens, as in the process of a worker,
it costs a look at a variable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

Listener: TypeAlias = Callable[[float], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(done: float) -> None:
    """Says that the share ``done`` of what runs now is done."""
    listener = _listener.get()
    if listener is not None:
        listener(done)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """For a ``with`` block, what is reported in this thread goes to ``listener``; nowhere if that is None."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def span(begin: float, end: float) -> Iterator[None]:
    """For a ``with`` block, what is reported is a part of the whole, from ``begin`` to ``end`` of it."""
    outer = _listener.get()
    with heard_by(outer and (lambda done: outer(begin + (end - begin) * done))):
        yield
    report(end)
