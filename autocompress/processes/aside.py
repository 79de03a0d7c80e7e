"""A process beside the study's that gets ready for its end while the trials run.

What ends a study needs much that nothing before it does: exporters, ONNX Runtime, matplotlib. Their import and
first use take seconds. A thread would take these from the training, for one thread at a time runs Python; another
process takes them from a core that trials leave idle.
"""

from collections.abc import Callable
from threading import RLock
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
    """Runs calls in a process of its own once that is started, and in this one otherwise."""

    def __init__(self) -> None:
        self._process: Remote | None = None
        self._was_started = False

    def start(self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Starts the process with its first call, for which nobody waits; does nothing the second time."""
        if not self._was_started:
            self._was_started = True
            # It has no GPU: what it is for runs on the CPU, and the memory is the trials'.
            workers = LocalWorkers(1, pack([]), threads=torch.get_num_threads(), gpus=[""])
            self._process = Remote(workers, [])
            self._submit(function, args, kwargs)

    def call(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns; whatever goes wrong in the other process, it runs in this one."""
        future = self._submit(function, args, kwargs) if self._process else None
        if future is not None:
            try:
                returned: T = future.result()
            except Exception:  # of the process, of what travels, or the function's own, which then comes again
                self.close()
            else:
                return returned
        return function(*args, **kwargs)

    def _submit(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self._process is not None
        try:
            return self._process.submit(_quietly, function, args, kwargs)
        except Exception:  # whatever a user's object raises that cannot be pickled
            self.close()
            return None

    def close(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._process.shutdown()
            self._process = None


def _quietly(function: Callable[..., T], args: Any, kwargs: Any) -> T:
    """The call without the talk of libraries: the terminal is the study's."""
    tqdm.set_lock(RLock())  # in place of one among processes, of which Python would say that it was left behind
    with quietly():
        return function(*args, **kwargs)
