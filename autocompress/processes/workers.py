"""Executors that run trials in this process, or in worker processes of this machine."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import ParamSpec, Protocol, TypeVar

import torch
from loky.backend import get_context
from loky.process_executor import ProcessPoolExecutor, ShutdownExecutorError

from autocompress.processes.parcel import opened, pack, run_packed, unpack_shared

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 2  # a call whose process died is repeated once
# By default loky takes a worker that has grown by 300 MB since its first call for leaking, and replaces it; a
# trial of a large model, or an import, may need more. In bytes.
NO_LEAKS = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}


class InProcess(Executor):
    """An executor that runs each call at once, in this process."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Runs the call at once; KeyboardInterrupt is raised here and not stored in the future."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Workers(Protocol):
    """Processes that run packed calls."""

    @property
    def size(self) -> int:
        """The number of calls that run at a time."""

    def run(self, call: bytes) -> bytes:
        """Runs `autocompress.processes.parcel.run_packed` on a call in an idle process. Thread-safe.

        Raises:
            BrokenExecutor: If the process died, and again when the call was repeated.
        """

    def close(self) -> None:
        """Ends the processes, even in the middle of calls."""


class Remote(Executor):
    """An executor that sends its calls to workers.

    Args:
        workers: The workers.
        shared: The objects that the workers have already, see `autocompress.processes.parcel.pack_shared`.
    """

    def __init__(self, workers: Workers, shared: Sequence[object]) -> None:
        self._workers, self._shared = workers, shared
        self._threads = ThreadPoolExecutor(workers.size, thread_name_prefix="trial")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Sends the call to the first worker that is idle."""
        call = pack((fn, args, kwargs), self._shared)
        return self._threads.submit(lambda: opened(self._workers.run(call)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the workers, and with them the calls that still run."""
        self._workers.close()
        self._threads.shutdown(wait, cancel_futures=True)


class LocalWorkers:
    """Worker processes on this machine, each with its own GPU if there are GPUs.

    They are started by loky, neither as forks, which break CUDA, nor by running the caller's script again. Each is
    a pool of its own, so that the death of one does not break the calls of others.

    Args:
        size: Number of processes.
        payload: The pickle of the shared objects, sent to each process once.
        threads: CPU threads of each process.
        gpus: GPUs as CUDA_VISIBLE_DEVICES names them; if there are fewer than processes, they are shared.
    """

    def __init__(self, size: int, payload: bytes, *, threads: int, gpus: Sequence[str] = ()) -> None:
        self.size = size
        self._idle: SimpleQueue[_LocalWorker] = SimpleQueue()
        self._all = []
        for i in range(size):
            environment = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
            self._all.append(_LocalWorker(payload, threads, NO_LEAKS | environment))
            self._idle.put(self._all[-1])

    def run(self, call: bytes) -> bytes:
        """See `Workers.run`."""
        worker = self._idle.get()
        try:
            for attempt in range(ATTEMPTS):
                try:
                    return worker.run(call)
                except BrokenExecutor as error:
                    if worker.closed or attempt == ATTEMPTS - 1:
                        raise BrokenExecutor(_how_it_died(error)) from None
            raise AssertionError("unreachable")
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """See `Workers.close`."""
        for worker in self._all:
            worker.close()


class _LocalWorker:
    """One process, started at the first call, and again after it has died."""

    def __init__(self, payload: bytes, threads: int, environment: dict[str, str]) -> None:
        self._setup, self._environment = (payload, threads), environment
        self._pool: ProcessPoolExecutor | None = None
        self._changing = threading.Lock()
        self.closed = False

    def run(self, call: bytes) -> bytes:
        """Runs a packed call.

        Raises:
            BrokenExecutor: If the process died, or was closed.
        """
        try:
            outcome: bytes = self._running().submit(_run_here, call).result()
        except BrokenExecutor:
            self._pool = None
            raise
        except ShutdownExecutorError as error:
            raise BrokenExecutor(str(error)) from error
        return outcome

    def _running(self) -> ProcessPoolExecutor:
        with self._changing:
            if self.closed:
                raise BrokenExecutor("the workers were ended")
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    max_workers=1,
                    context=get_context("loky"),
                    env=self._environment,
                    initializer=_begin,
                    initargs=(*self._setup, os.getpid()),
                )
            return self._pool

    def close(self) -> None:
        """Ends the process at once."""
        with self._changing:
            self.closed = True
            if self._pool is not None:
                self._pool.shutdown(kill_workers=True)


def _how_it_died(error: BrokenExecutor) -> str:
    signals = re.findall(r"SIG[A-Z]+", str(error))
    by = f" by {signals[0]}" if signals else ""
    memory = ", as a system that is out of memory does it" if "SIGKILL" in signals else ""
    return f"its process was ended{by}{memory}, {ATTEMPTS} times"


# The code below runs in a worker.

_payload = b""
_shared: list[object] | None = None


def _begin(payload: bytes, threads: int, parent: int) -> None:
    """Initializes a new worker."""
    global _payload
    _payload = payload
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent handles it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has died, which nothing else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_here(call: bytes) -> bytes:
    global _payload, _shared
    if _shared is None:  # not in `_begin`, where an error would break the pool instead of failing the call
        _shared, _payload = unpack_shared(_payload), b""
    return run_packed(call, _shared)
