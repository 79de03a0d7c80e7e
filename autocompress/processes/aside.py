"""A process beside the study's that logs it, and gets ready for its end while the trials run.

What a study needs beside its trials takes seconds to import and to use first: MLflow, exporters, ONNX Runtime,
matplotlib. A thread would take these from the training, for one thread at a time runs Python; another process
takes them from a core that trials leave idle.
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

WORTH_S = 20.0  # of trials to come: what it takes to get ready
NICENESS = 5  # of the process: it takes what trials leave, or a fifth of a core that they all want


@dataclass(frozen=True)
class Begun(Generic[T]):
    """A call that `Aside.begin` has begun."""

    _future: "Future[T] | None"
    _here: Callable[[], T]
    _failed: Callable[[], None]

    def outcome(self) -> T:
        """What the function returns; whatever goes wrong in the other process, it runs in this one."""
        if self._future is not None:
            try:
                return self._future.result()
            except Exception:  # of the process, of what travels, or the function's own, which then comes again
                self._failed()
        return self._here()

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be waited for: it has been made, or will not be before it is needed."""
        return self._future is None or self._future.done()

    def cancel(self) -> None:
        """It need not run: where it does not do so yet, it will not."""
        if self._future is not None:
            self._future.cancel()


class Aside:
    """Runs calls in a process of its own once that is started, and in this one otherwise. For any thread.

    Args:
        allowed: Whether there may be such a process.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        self._process: Remote | None = None
        self._may_start = allowed
        self._changing = Lock()

    @property
    def is_there(self) -> bool:
        """Whether the process is started, and has not been given up."""
        return self._process is not None

    def start(self) -> None:
        """Starts the process, unless it was before or may not be."""
        with self._changing:
            if self._may_start:
                self._may_start = False
                # It has no GPU: what it is for runs on the CPU, and the memory is the trials'.
                workers = LocalWorkers(1, pack([]), threads=torch.get_num_threads(), gpus=[""])
                self._process = Remote(workers, [])

    def begin(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Begun[T]:
        """Has the process make a call, after earlier ones; without the process it is made when it is needed."""
        here = functools.partial(function, *args, **kwargs)
        return Begun(self._submit(function, args, kwargs), here, self.close)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns, see `Begun.outcome`."""
        return self.begin(function, *args, **kwargs).outcome()

    def _submit(self, function: Callable[..., T], args: Any, kwargs: Any) -> "Future[T] | None":
        process = self._process
        try:
            return process.submit(_quietly, function, args, kwargs) if process is not None else None
        except Exception:  # whatever a user's object raises that cannot be pickled
            self.close()
            return None

    def close(self) -> None:
        """Ends the process, whatever it does."""
        with self._changing:
            process, self._process, self._may_start = self._process, None, False
        if process is not None:
            process.shutdown()


def keep_loaded() -> None:
    """Has the garbage collector leave alone what is in memory: libraries, whose million objects it would look at.

    One look takes half a second, and it comes in the middle of whatever is waited for.
    """
    gc.collect()
    gc.freeze()


def _quietly(function: Callable[..., T], args: Any, kwargs: Any) -> T:
    """The call without the talk of libraries: the terminal is the study's, and so are the cores."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    tqdm.set_lock(RLock())  # in place of one among processes, of which Python would say that it was left behind
    with quietly():
        return function(*args, **kwargs)
