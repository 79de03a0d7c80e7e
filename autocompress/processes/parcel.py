"""What travels to other processes: calls and their results as bytes, what all calls share only once.

By cloudpickle, so that a model, a loss or an objective that was defined in a script, a notebook or ``file.py``
need not be importable where it arrives. A pickle is a program: it is only ever read from processes that the study
started, or of the cluster whose address it was given.
"""

import io
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import cloudpickle

from autocompress.goal import Objective
from autocompress.metrics import Metric
from autocompress.plugins import modules_from_files
from autocompress.task import Task


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Leaves out what is shared; takes functions themselves where others pickle the name of their file."""

    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        if shared:
            places = {id(one): place for place, one in enumerate(shared)}
            self.persistent_id = lambda one: places.get(id(one))

    def reducer_override(self, value: Any) -> Any:
        """Objectives and metrics by what they are made of: a file of theirs may not be where they arrive."""
        if isinstance(value, Objective | Metric):
            return type(value), tuple(getattr(value, field.name) for field in fields(value))
        return super().reducer_override(value)


class _Unpickler(cloudpickle.pickle.Unpickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        self.persistent_load = shared.__getitem__


def pack(value: Any, shared: Sequence[object] = ()) -> bytes:
    """The value as bytes; an object that is one of ``shared`` only as its place there."""
    for module in modules_from_files():
        cloudpickle.register_pickle_by_value(module)
    file = io.BytesIO()
    _Pickler(file, shared).dump(value)
    return file.getvalue()


def unpack(data: bytes, shared: Sequence[object] = ()) -> Any:
    """The value that `pack` was given, with ``shared`` as they are here."""
    return _Unpickler(io.BytesIO(data), shared).load()


def pack_shared(parts: Mapping[str, object]) -> tuple[list[object], bytes]:
    """What all calls of a study have in common: the objects as `pack` needs them, and as bytes for each worker.

    Args:
        parts: By name; what is cheaper to send each time, such as a number, is left out.

    Raises:
        ValueError: If one cannot be sent to another process; the message says which and why.
    """
    shared = [part for part in parts.values() if not isinstance(part, str | int | float | None)]
    try:
        return shared, pack(shared)
    except Exception as error:  # whatever a user's object raises that cannot be pickled
        name, reason = _what_stays(parts) or ("the task", error)
        raise ValueError(
            f"{name} cannot be sent to another process ({type(reason).__name__}: {_first_line(reason)}); open "
            "files and connections where they are first used, or run without workers"
        ) from error


def unpack_shared(payload: bytes) -> list[object]:
    """The objects that `pack_shared` sent.

    Raises:
        ValueError: If they cannot be made again here.
    """
    try:
        shared: list[object] = unpack(payload)
    except Exception as error:  # whatever the modules raise that it needs
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(
            f"a worker cannot take the study over ({said}); what its model and data are made of must be installed "
            "where the workers run, in the same versions"
        ) from error
    return shared


def _what_stays(parts: Mapping[str, object]) -> tuple[str, Exception] | None:
    """The first of the parts that cannot be packed, by name, and why."""
    for name, part in parts.items():
        within = {f"{name}.{key}": value for key, value in vars(part).items()} if isinstance(part, Task) else {}
        if found := _what_stays(within):
            return found
        try:
            pack(part)
        except Exception as error:
            return name, error
    return None


def run_packed(call: bytes, shared: Sequence[object]) -> bytes:
    """Runs a packed ``(function, args, kwargs)``; returns what came of it for `opened`. Does not raise."""
    try:
        function, args, kwargs = unpack(call, shared)
        return pack((True, function(*args, **kwargs)))
    except Exception as error:
        error.add_note(f"In a worker:\n{traceback.format_exc()}")
        try:
            return pack((False, error))
        except Exception:  # not every exception can be pickled
            return pack((False, RuntimeError(f"{type(error).__name__}: {error}")))


def opened(outcome: bytes) -> Any:
    """What the call in `run_packed` returned.

    Raises:
        Exception: What the call raised.
    """
    succeeded, value = unpack(outcome)
    if not succeeded:
        raise value
    return value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
