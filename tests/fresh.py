"""The fresh processes that run exported files, as forks of one that has imported torch and ONNX Runtime.

Each saves four seconds of a core. It runs the script of `autocompress.formats.parity` as a process from nothing
does, knows as little of autocompress, and has a folder, an environment and streams of its own.
"""

import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

LARGEST_REQUEST = 1 << 20


class Forked:
    """As much of ``subprocess.Popen`` as is needed."""

    def __init__(self, address: str, script: str, stderr: IO[bytes], env: dict[str, str]) -> None:
        theirs, ours = os.pipe()
        self.stdin = os.fdopen(ours, "w")
        self.returncode: int | None = None
        self._ends = socket.socket(socket.AF_UNIX)  # with the process
        self._ends.connect(address)
        request = {"script": script, "cwd": str(Path.cwd()), "env": env}
        socket.send_fds(self._ends, [json.dumps(request).encode()], [theirs, stderr.fileno()])
        os.close(theirs)
        self.pid = int(self._ends.recv(100))

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._ends], [], [], 0)[0]:
            self.returncode = 1  # whatever it was: nobody asks
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self._ends.recv(1)
        self._ends.close()
        self.returncode = 1


class Fresh:
    """Has this process start such processes; until the end of the block of a ``with`` statement."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()  # the path of a socket must be short
        self._address = f"{self._folder.name}/fresh"
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Fresh":
        self._from_nothing = use(self.address)
        return self

    @contextlib.contextmanager
    def left_alone(self) -> Iterator[None]:
        """A block in which they begin with nothing, as they do for a user."""
        from autocompress.formats import parity

        forked, parity._started = parity._started, self._from_nothing
        try:
            yield
        finally:
            parity._started = forked

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.communicate()
        self._folder.cleanup()

    def address(self) -> str:
        """Of the process to fork from, which is started if it was not."""
        if self._server is None:
            command = [sys.executable, "-P", __file__, self._address]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._server.stdout is not None
            self._server.stdout.readline()  # it listens
        return self._address


def use(address: Callable[[], str]) -> Callable[[], Any]:
    """Has this process, and forks of it, run exported files in forks; what started a process before."""
    from autocompress.formats import parity

    read_torchlib_once()

    def started() -> tuple[Any, IO[bytes]]:
        said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        return Forked(address(), parity.__file__, said, {**os.environ, **parity.NO_TELEMETRY}), said

    before, parity._started = parity._started, started
    return before


def read_torchlib_once() -> None:
    """For every ONNX file torch reads the source of 557 functions again, which takes half a second."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)


def serve(address: str) -> None:
    """A connection a process: it brings the streams and the request, and is told the process's id."""
    os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["ORT_TELEMETRY_DISABLED"] = "1"
    import onnxruntime  # noqa: F401
    import torch

    with tempfile.TemporaryFile() as file:  # most of what is imported comes with the first file
        torch.export.save(torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(2, 1),)), file)
        file.seek(0)
        torch.export.load(file)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("listening", flush=True)
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                become(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass  # what has ended


def become(connection: socket.socket) -> None:
    """The process that was asked for, to its end."""
    said, (stdin, stderr), *_ = socket.recv_fds(connection, LARGEST_REQUEST, 2)
    request = json.loads(said)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for source, target in ((stdin, 0), (os.open(os.devnull, os.O_WRONLY), 1), (stderr, 2)):
        os.dup2(source, target)
    sys.stdin = os.fdopen(0)
    connection.send(str(os.getpid()).encode())
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
