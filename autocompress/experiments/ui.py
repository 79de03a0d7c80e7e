"""Serves the MLflow UI on an output directory."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from autocompress.experiments.mlflow_store import (
    ARTIFACTS,
    DATABASE,
    check_database,
    database_uri,
    page_of_latest_study,
)

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 5.0


def serve_ui(
    out: Path, host: str = "127.0.0.1", port: int | None = None, *, say: Callable[[str], None] = print
) -> int:
    """Serves the MLflow UI on ``out`` until Ctrl-C, in a process that ends with this function.

    Args:
        out: The output directory, with ``mlflow.db`` in it.
        host: The address to listen on; the default can be reached from this machine only.
        port: The port; a free one by default.
        say: Called with each line for the user.

    Returns:
        0 after Ctrl-C; the server's exit code if it ended by itself.

    Raises:
        ValueError: If there are no studies in ``out``, its database is damaged, the port is taken or the
            server does not start.
    """
    out = out.absolute()
    if not (out / DATABASE).is_file():
        raise ValueError(f"no {DATABASE} in {out}; run a study with --out {shlex.quote(str(out))} first")
    try:
        check_database(out)
    except Exception as error:
        raise ValueError(f"{out / DATABASE} cannot be opened: {error}") from error
    port = _free_port(host, port)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    say("starting MLflow (about 15 s)")
    with _terminable(), _server(out, host, port) as (server, log), contextlib.suppress(KeyboardInterrupt):
        _wait_until_up(server, f"{url}/health", log)
        say(f"MLflow is up (Ctrl-C stops it): {url}/{page_of_latest_study(out)}")
        return server.wait()
    return 0


@contextlib.contextmanager
def _server(out: Path, host: str, port: int) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Starts the server; yields its process and the file with its output; on exit ends all its processes."""
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1"]
    command += ["--host", host, "--port", str(port)]
    command += ["--backend-store-uri", database_uri(out), "--artifacts-destination", str(out / ARTIFACTS)]
    with tempfile.TemporaryDirectory(dir=out, prefix=".mlflow-ui-") as scratch:
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight more processes, for evaluating LLMs
            "TMPDIR": scratch,
        }
        log = Path(scratch) / "log.txt"
        with log.open("wb") as output:
            server = subprocess.Popen(
                command,
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group, so that its workers can be ended with it
            )
        try:
            yield server, log
        finally:
            _stop(server)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Ends the server with all its workers: by SIGTERM, then by SIGKILL."""
    if os.name != "posix":
        server.terminate()
        server.wait()
        return
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):  # raised by `killpg` once all processes have ended
        os.killpg(server.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.05)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_until_up(server: "subprocess.Popen[bytes]", health: str, log: Path) -> None:
    """Waits until the server answers; ValueError, with the last line of its output, if it does not start."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError):
            opener.open(health, timeout=2).close()
            return
        time.sleep(0.2)
    output = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    raise ValueError(f"the MLflow server did not start: {output[-1]}")


def _free_port(host: str, port: int | None) -> int:
    """The given port, or any if that is None; ValueError if it is not free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does, for a quick restart
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port or 'any port'}: {error.strerror}") from error
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM and a closed terminal act like Ctrl-C, so that the server never outlives this process."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        previous = {name: signal.signal(getattr(signal, name), interrupt) for name in names}
    except ValueError:  # not in the main thread, which alone may set handlers
        previous = {}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)
