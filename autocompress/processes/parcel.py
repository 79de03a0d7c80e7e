"""Pickles calls and their results for other processes; objects that all calls share are sent only once.

It uses cloudpickle, so that a model, a loss or an objective defined in a script, a notebook or ``file.py`` need
not be importable in the other process. A pickle can execute code: it is only read from processes that the study
has started, or from the cluster whose address it was given.
"""

import importlib
import io
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

import cloudpickle

from autocompress.goal import Objective
from autocompress.metrics import Metric
from autocompress.plugins import modules_from_files
from autocompress.task import Task


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles shared objects as their index, and objectives and metrics by value instead of by file.

    Modules of a class of their own, which cloudpickle cannot pickle, are imported by name.
    """

    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        if shared:
            indices = {id(value): index for index, value in enumerate(shared)}
            self.persistent_id = lambda value: indices.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        """Pickles objectives and metrics by their fields: the other process may not have their file."""
        if isinstance(value, Objective | Metric):
            return type(value), tuple(getattr(value, field.name) for field in fields(value))
        if isinstance(value, ModuleType) and type(value) is not ModuleType:  # as torch.backends; by its name
            return importlib.import_module, (value.__name__,)
        return super().reducer_override(value)


class _Unpickler(cloudpickle.pickle.Unpickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, shared: Sequence[object]) -> None:
        super().__init__(file)
        self.persistent_load = shared.__getitem__


def pack(value: Any, shared: Sequence[object] = ()) -> bytes:
    """Pickles a value; an object in it that is one of ``shared`` is pickled as its index there."""
    for module in modules_from_files():
        cloudpickle.register_pickle_by_value(module)
    file = io.BytesIO()
    _Pickler(file, shared).dump(value)
    return file.getvalue()


def unpack(data: bytes, shared: Sequence[object] = ()) -> Any:
    """Unpickles a value of `pack`, with this process's ``shared`` objects."""
    return _Unpickler(io.BytesIO(data), shared).load()


def pack_shared(parts: Mapping[str, object]) -> tuple[list[object], bytes]:
    """Pickles the objects that all calls of a study share.

    Args:
        parts: The objects by name; numbers and strings are left out, as they are cheap to send with each call.

    Returns:
        The shared objects, for `pack`, and their pickle, for each worker.

    Raises:
        ValueError: If one cannot be pickled; the message says which and why.
    """
    shared = [part for part in parts.values() if not isinstance(part, str | int | float | None)]
    try:
        return shared, pack(shared)
    except Exception as error:  # whatever a user's object raises that cannot be pickled
        name, reason = _first_unpicklable(parts) or ("the task", error)
        raise ValueError(
            f"{name} cannot be sent to another process ({type(reason).__name__}: {_first_line(reason)}); open "
            "files and connections where they are first used, or run without workers"
        ) from error


def unpack_shared(payload: bytes) -> list[object]:
    """Unpickles the objects of `pack_shared`.

    Raises:
        ValueError: If they cannot be unpickled here.
    """
    try:
        shared: list[object] = unpack(payload)
    except Exception as error:  # whatever the imports of the pickle's modules raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(
            f"a worker cannot take the study over ({reason}); what its model and data are made of must be "
            "installed where the workers run, in the same versions"
        ) from error
    return shared


def _first_unpicklable(parts: Mapping[str, object]) -> tuple[str, Exception] | None:
    """The name of the first part, or attribute of a task, that cannot be pickled, and the error."""
    for name, part in parts.items():
        attributes = vars(part) if isinstance(part, Task) else {}
        if found := _first_unpicklable({f"{name}.{key}": value for key, value in attributes.items()}):
            return found
        try:
            pack(part)
        except Exception as error:
            return name, error
    return None


def run_packed(call: bytes, shared: Sequence[object]) -> bytes:
    """Runs a packed ``(function, args, kwargs)``; returns its packed result or exception, for `opened`."""
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
    """The result of a call that `run_packed` has run.

    Raises:
        Exception: The exception that the call raised.
    """
    succeeded, value = unpack(outcome)
    if not succeeded:
        raise value
    return value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
