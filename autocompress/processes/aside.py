"""The background process of a study, which logs to MLflow and prepares the study's end while its trials run.

MLflow, exporters, ONNX Runtime and matplotlib take seconds to import and to use for the first time. In a thread
these would hold up the training, because of Python's global interpreter lock; another process uses an idle core.
"""

import functools
import gc
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from tqdm import tqdm

from autocompress.formats.onnx_export import quietly
from autocompress.processes.parcel import pack
from autocompress.processes.workers import LocalWorkers, Remote

P = ParamSpec("P")
T = TypeVar("T")

WORTH_S = 20.0  # seconds of trials still to come from which on starting the process saves time
NICENESS = 5  # of the process: it uses what the trials leave idle, or about a fifth of a core if they leave none


@dataclass(frozen=True)
class Begun(Generic[T]):
    """A call that was begun by `Aside.begin`."""

    _future: "Future[T] | None"
    _here: Callable[[], T]
    _failed: Callable[[], None]

    def outcome(self) -> T:
        """Waits for the function's result; if the other process fails in any way, calls the function here."""
        if self._future is not None:
            try:
                return self._future.result()
            except Exception:  # of the process, of pickling, or of the function, which then raises it again here
                self._failed()
        return self._here()

    @property
    def is_done(self) -> bool:
        """Whether `outcome` need not wait for the process: the call is finished, or will be made here."""
        return self._future is None or self._future.done()

    def cancel(self) -> None:
        """Cancels the call unless it is running already."""
        if self._future is not None:
            self._future.cancel()


class Aside:
    """Runs calls in a background process once that is started, and in this process otherwise. Thread-safe.

    Args:
        allowed: Whether the process may be started.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        self._process: Remote | None = None
        self._may_start = allowed
        self._changing = Lock()

    @property
    def is_there(self) -> bool:
        """Whether the process has been started and not been closed."""
        return self._process is not None

    def start(self) -> None:
        """Starts the process, unless it was started before or is not allowed."""
        with self._changing:
            if self._may_start:
                self._may_start = False
                # Without GPUs: its work runs on the CPU, and it must not take memory from the trials.
                workers = LocalWorkers(1, pack([]), threads=torch.get_num_threads(), gpus=[""])
                self._process = Remote(workers, [])

    def begin(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Begun[T]:
        """Begins a call in the process, after earlier ones; without the process, `Begun.outcome` makes it."""
        here = functools.partial(function, *args, **kwargs)
        return Begun(self._submit(function, args, kwargs), here, self.close)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, see `Begun.outcome`."""
        return self.begin(function, *args, **kwargs).outcome()

    def _submit(self, function: Callable[..., T], args: Any, kwargs: Any) -> "Future[T] | None":
        process = self._process
        try:
            return process.submit(_quietly, function, args, kwargs) if process is not None else None
        except Exception:  # whatever a user's object raises that cannot be pickled
            self.close()
            return None

    def close(self) -> None:
        """Ends the process, even in the middle of a call."""
        with self._changing:
            process, self._process, self._may_start = self._process, None, False
        if process is not None:
            process.shutdown()


def keep_loaded() -> None:
    """Exempts all present objects from garbage collection.

    With the million objects of the imported libraries a full collection takes half a second, and would come in the
    middle of work that the study waits for.
    """
    gc.collect()
    gc.freeze()


def _quietly(function: Callable[..., T], args: Any, kwargs: Any) -> T:
    """Calls a function at low priority and without the output of libraries on the terminal."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    tqdm.set_lock(RLock())  # its default is a lock between processes, which Python warns of as leaked at the end
    with quietly():
        return function(*args, **kwargs)
