"""Processes that need no imports: forks of one that has imported everything. Each saves ten seconds of a core.

It is a process like any other, with a folder, an environment, streams and signals of its own. What
a command costs to start, and what it imports, only a process from nothing can say.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE_S = 600  # for one process; it takes a twentieth on a machine with nothing else to do
IMPORTED = (
    "autocompress.terminal.display",
    "autocompress.gauges.profile",
    "autocompress.report",
    "autocompress.terminal.show",
    "autocompress.tuning",
    "onnx",
    "onnxscript.function_libs.torch_lib.ops",
    "torch.export._trace",
)


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    status: int
    stdout: str
    stderr: str


class Started:
    """A process that runs, its stdout and stderr open to be read; as much of ``subprocess.Popen`` as is needed."""

    def __init__(self, warm: "Warm", pid: int, stdout: Path, stderr: Path) -> None:
        self.pid = pid
        self.stdout, self.stderr = stdout.open(), stderr.open()  # in the order in which they are opened there
        self.returncode: int | None = None
        self._warm = warm

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit status, or minus the number of the signal that ended it."""
        if self.returncode is None:
            self.returncode = self._warm._ask({"wait": self.pid})
        return self.returncode

    def close(self) -> None:
        """Leaves no process behind."""
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()


class Warm:
    """Starts processes; ends with the block of a ``with`` statement.

    Args:
        folder: An empty folder for what they say.
        fresh: The address from which they fork the processes that run exported files, see ``fresh.py``.
    """

    def __init__(self, folder: Path, fresh: str) -> None:
        self._folder = folder
        self._n_started = 0
        home = folder / "home"
        home.mkdir()
        self._server = subprocess.Popen(
            [sys.executable, __file__, fresh],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HOME": str(home)},
        )

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str] = os.environ) -> Ended:
        """Runs ``autocompress ...``, ``script.py ...`` or any other program to its end."""
        stdout, stderr = self._streams()
        pid = self._start(argv, cwd, env, stdout, stderr)
        watchdog = threading.Timer(PATIENCE_S, os.kill, (pid, signal.SIGKILL))
        watchdog.start()
        status = self._ask({"wait": pid})
        watchdog.cancel()
        return Ended(status, stdout.read_text(), stderr.read_text())

    def start(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str] = os.environ) -> Started:
        """Runs the same in the background."""
        stdout, stderr = self._streams()
        for file in (stdout, stderr):
            os.mkfifo(file)
        return Started(self, self._start(argv, cwd, env, stdout, stderr), stdout, stderr)

    def _streams(self) -> tuple[Path, Path]:
        self._n_started += 1
        return self._folder / f"{self._n_started}.stdout", self._folder / f"{self._n_started}.stderr"

    def _start(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: Path, stderr: Path) -> int:
        streams = {"stdout": str(stdout), "stderr": str(stderr)}
        return self._ask({"argv": list(argv), "cwd": str(cwd), "env": dict(env), **streams})

    def _ask(self, request: dict[str, Any]) -> int:
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return int(stdout.readline())


_status = [0]


def leave() -> None:
    """Ends this process without taking apart all that it has imported, which takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status[0])


def serve(fresh: str) -> None:
    """One request a line: a process to start, answered by its id, or one to wait for, answered by its status."""
    atexit.register(leave)  # the first to be registered is the last to be called
    import_everything()
    runpy.run_path(str(Path(__file__).with_name("fresh.py")))["use"](lambda: fresh)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _status[0] = 1  # unless it comes to its end
                become(request)
                _status[0] = 0
                return
        print(answer, flush=True)


def import_everything() -> None:
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    from autocompress.experiments.mlflow_store import quiet_mlflow
    from autocompress.goal import OBJECTIVES
    from autocompress.scheme import SCHEMES

    list(SCHEMES), list(OBJECTIVES)  # the plugins
    with quiet_mlflow():
        for module in ("mlflow.artifacts", "mlflow.store.tracking.sqlalchemy_store"):
            importlib.import_module(module)


def become(request: dict[str, Any]) -> None:
    """The process that was asked for, to its end."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), fd)
        # One of a new process: the old one may take a pipe for a file, which it was.
        setattr(sys, name, os.fdopen(fd, "w", 1, "utf-8", closefd=False))
    program, *_ = sys.argv = request["argv"]
    if program == "autocompress":
        from autocompress.cli import main

        try:
            main()
        except SystemExit as error:
            _status[0] = int(error.code or 0)
            raise
    elif program.endswith(".py"):
        warnings.simplefilter("error")
        runpy.run_path(program, run_name="__main__")
    else:
        os.execvp(program, request["argv"])


if __name__ == "__main__":
    serve(*sys.argv[1:])
