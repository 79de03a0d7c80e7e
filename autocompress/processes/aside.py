"""A process beside the study's that logs it, and gets ready for its end while the trials run.

What a study needs beside its trials takes seconds to import and to use first: MLflow, exporters, ONNX Runtime,
matplotlib. A thread would take these from the training, for one thread at a time runs Python; another process
takes them from a core that trials leave idle.
"""

from collections.abc import Callable
from threading import Lock, RLock
from typing import Any, ParamSpec, TypeVar

import torch
from tqdm import tqdm

from autocompress.formats.onnx_export import quietly
from autocompress.processes.parcel import pack
from autocompress.processes.workers import LocalWorkers, Remote

P = ParamSpec("P")
T = TypeVar("T")

WORTH_S = 20.0  # of trials to come: several times what it takes to get ready


class Aside:
    """Runs calls in a process of its own once that is started, and in this one otherwise. For any thread.

    Args:
        allowed: Whether there may be such a process.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        self._process: Remote | None = None
        self._may_start, self._is_prepared = allowed, False
        self._changing = Lock()

    def start(self) -> None:
        """Starts the process, unless it was before or may not be."""
        with self._changing:
            if self._may_start:
                self._may_start = False
                # It has no GPU: what it is for runs on the CPU, and the memory is the trials'.
                workers = LocalWorkers(1, pack([]), threads=torch.get_num_threads(), gpus=[""])
                self._process = Remote(workers, [])

    def prepare(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Has the process run a call for which nobody waits; does nothing without it, or the second time."""
        if self._process is not None and not self._is_prepared:
            self._is_prepared = True
            self._submit(function, args, kwargs)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns; whatever goes wrong in the other process, it runs in this one."""
        future = self._submit(function, args, kwargs)
        if future is not None:
            try:
                returned: T = future.result()
            except Exception:  # of the process, of what travels, or the function's own, which then comes again
                self.close()
            else:
                return returned
        return function(*args, **kwargs)

    def _submit(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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


def _quietly(function: Callable[..., T], args: Any, kwargs: Any) -> T:
    """The call without the talk of libraries: the terminal is the study's."""
    tqdm.set_lock(RLock())  # in place of one among processes, of which Python would say that it was left behind
    with quietly():
        return function(*args, **kwargs)
