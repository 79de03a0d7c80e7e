"""Runs exported files in a fresh process that cannot import autocompress.

An exported file is offered only if it gives the same outputs where it will be used: with torch or ONNX Runtime
alone. So a second Python process loads and runs it. That process runs this file as a script, by its path, with the
name autocompress blocked. Calls that need autocompress are made there last, after unblocking it.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = list[NDArray[Any]]
Run: TypeAlias = Callable[[Arrays], Arrays]

TIMEOUT_S = 300.0
GETS_READY_S = 60.0  # a waiting process that has not finished its warm-up by then is replaced
ENDINGS = ANSWERS, ERROR, UNDELIVERED = ".npz", ".error", ".undelivered"  # suffixes of the files with results

# ONNX Runtime's telemetry would leave files in the home directory; its import reads either name.
NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}


class Undelivered(str):
    """The reason why a call was not made: it could not be unpickled in the fresh process."""


class FreshProcess:
    """A second Python process that runs exported files while this one is still exporting. A context manager.

    It is started early and given each file as soon as that is written, so that importing torch and loading the
    file take little extra time. A process that has run something before is quicker still, see `have_waiting`.

    Args:
        folder: An existing folder for the files that the two processes exchange.
        inputs: Batches to run each file on.
    """

    def __init__(self, folder: Path, inputs: Sequence[NDArray[Any]]) -> None:
        self._folder = folder
        self._runs: dict[str, _Python] = {}  # the process that runs each format
        save_arrays(folder / "inputs.npz", inputs)

    def __enter__(self) -> Self:
        self._python = _taken() or _Python()
        self._python.serve(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        for python in {self._python, *self._runs.values()}:
            python.wait_again()

    def start(self, format: str, file: Path) -> None:
        """Starts loading ``file`` and running it on the inputs; returns at once."""
        self._runs[format] = self._python
        self._python.ask(format, [format, str(file)])

    def start_call(self, format: str, call: bytes) -> None:
        """Starts a call of a pickled ``(function, arguments)``, with the inputs as the last argument.

        The function may use autocompress and all modules that can be imported here. So it has to come last: for
        files that are started after it, it would not be shown that they run without autocompress.
        """
        (self._folder / f"{format}.call").write_bytes(call)
        if (python := _taken(knowing=True)) is not None:
            python.serve(self._folder)
        else:
            python = self._python
        python.knows = True
        self._runs[format] = python
        python.ask(format, {"format": format, "path": sys.path})

    def finish(self, formats: Sequence[str]) -> dict[str, Arrays | str]:
        """Waits for the formats; returns for each its outputs, one array per input, or an error in one line."""
        end = time.monotonic() + TIMEOUT_S
        return {format: self._outcome(format, end) for format in formats}

    def _outcome(self, format: str, end: float) -> Arrays | str:
        python = self._runs[format]
        python.has_answered([format], end - time.monotonic())
        if (answers := self._folder / f"{format}{ANSWERS}").exists():
            return load_arrays(answers)
        for ending, kind in ((ERROR, str), (UNDELIVERED, Undelivered)):
            if (file := self._folder / f"{format}{ending}").exists():
                return kind(file.read_text(encoding="utf-8"))
        return python.last_words or f"it had not answered after {TIMEOUT_S:.0f} s"


class _Python:
    """A fresh process that runs requests one after the other.

    Args:
        waits: Whether it waits for another export when it is done with one.

    Attributes:
        knows: Whether it may have imported autocompress: then it cannot show that a file runs without.
    """

    def __init__(self, *, waits: bool = False) -> None:
        self.knows, self._waits = False, waits
        self._process, self._stderr = _started()

    def serve(self, folder: Path) -> None:
        """Makes it read inputs from, and write answers to, this folder from now on."""
        self._folder: Path = folder
        self._asked: list[str] = []
        self._send(str(folder))

    def ask(self, format: str, request: object) -> None:
        """Sends a request; the file with the answer will have the name ``format``."""
        self._asked.append(format)
        self._send(request)

    def _send(self, request: object) -> None:
        assert self._process.stdin is not None
        # If the process has died, `last_words` says why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def last_words(self) -> str:
        """The exit code and the last line on stderr, in one line; empty while the process is running."""
        if self.is_alive:
            return ""
        self._stderr.seek(0)
        said = _last_line(self._stderr.read().decode(errors="replace"))
        return f"the process that ran it died with code {self._process.returncode}: {said}"

    def has_answered(self, formats: Sequence[str], timeout_s: float) -> bool:
        """Waits until there are answers to all of these, or the process ends; returns whether they are there."""
        end = time.monotonic() + timeout_s
        while True:
            ended = not self.is_alive  # checked first: it may answer just before it ends
            if all(any((self._folder / f"{format}{ending}").exists() for ending in ENDINGS) for format in formats):
                return True
            if ended or time.monotonic() >= end:
                return False
            time.sleep(0.01)

    def is_ready(self, timeout_s: float) -> bool:
        """Waits for the answers to all requests; returns whether it can take more."""
        return self.has_answered(self._asked, timeout_s) and self.is_alive

    def wait_again(self) -> None:
        """Keeps it for the next export if it waits, and ends it otherwise."""
        if self._waits and self.is_ready(0):
            self._asked = []  # the files with these answers may be removed
            _waiting.append(self)
        else:
            self.end()

    def end(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


# Idle processes: at most one that may have imported autocompress and one that has not. They end with this process.
_waiting: list[_Python] = []


def have_waiting(folder: Path, files: Mapping[str, Path], inputs: Sequence[NDArray[Any]]) -> None:
    """Starts a process that waits for the next `FreshProcess`, unless there is one, and warms it up.

    This returns at once. The process waits again after each export. One that may have imported autocompress is
    used only for calls that need it, so that there may be two in the end.

    Args:
        folder: A folder for a temporary one in which files are exchanged during the warm-up.
        files: The files to run as a warm-up, by format.
        inputs: Batches to run them on.
    """
    if any(one.is_alive and not one.knows for one in _waiting):
        return
    exchange = Path(tempfile.mkdtemp(dir=folder))
    save_arrays(exchange / "inputs.npz", inputs)
    python = _Python(waits=True)
    python.serve(exchange)
    for format, file in files.items():
        python.ask(format, [format, str(file)])
    _waiting.append(python)


def _taken(*, knowing: bool = False) -> _Python | None:
    """A process of `_waiting` that is ready, removed from there; None if there is none."""
    for one in [one for one in _waiting if one.knows == knowing]:
        _waiting.remove(one)
        if one.is_ready(GETS_READY_S):
            return one
        one.end()
    return None


def _started() -> tuple[subprocess.Popen[str], IO[bytes]]:
    """A new process, and the file that receives its stderr."""
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
    # -P keeps this script's folder off the path: a module of autocompress must not stand in for another.
    command = [sys.executable, "-P", __file__]
    environment = os.environ | NO_TELEMETRY
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr, text=True, env=environment
    )
    return process, stderr


def save_arrays(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    """Writes arrays to an .npz file that appears only when it is complete."""
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.savez(file, *arrays)
    unfinished.replace(path)


def load_arrays(path: Path) -> Arrays:
    """Reads the arrays that `save_arrays` wrote, in order."""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{i}"] for i in range(len(stored.files))]


def reason(error: BaseException) -> str:
    """An error in one line: its root cause's, as exporters wrap it in pages of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # the next line has the reason
        lines[0] += f" {lines[1]}"
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def run_pt2(file: Path, inputs: Arrays) -> Arrays:
    """Outputs of a torch.export file, one per input."""
    import torch

    model = torch.export.load(file).module()
    with torch.inference_mode():
        return [model(torch.from_numpy(x)).float().numpy() for x in inputs]


def run_onnx(file: Path, inputs: Arrays) -> Arrays:
    """Outputs of an ONNX file under ONNX Runtime on the CPU, one per input."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [session.run(None, {"input": x})[0] for x in inputs]


def run_executorch(file: Path, inputs: Arrays) -> Arrays:
    """Outputs of an ExecuTorch program, one per input."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return [method.execute([torch.from_numpy(x)])[0].float().numpy() for x in inputs]


RUNNERS: Mapping[str, Callable[[Path, Arrays], Arrays]] = {
    "pt2": run_pt2,
    "onnx": run_onnx,
    "executorch": run_executorch,
}


def received(call: Path, path: list[str]) -> Run:
    """Unblocks autocompress, sets the module search path, and unpickles the call in a file."""
    if sys.modules.get("autocompress", main) is None:  # blocked
        del sys.modules["autocompress"]
    sys.path[:] = path
    function, arguments = pickle.loads(call.read_bytes())
    return partial(function, *arguments)


def main() -> None:
    """The fresh process: reads lines from stdin, each a folder, a file to run or a call, until it closes."""
    import onnxruntime  # noqa: F401  imported before the first request comes
    import torch.export  # noqa: F401

    for line in sys.stdin:
        match json.loads(line):
            case str(name):
                folder = Path(name)
                inputs = load_arrays(folder / "inputs.npz")
            case [format, file]:
                answer(folder / format, partial(RUNNERS[format], Path(file)), inputs)
            case {"format": format, "path": path}:
                try:
                    run = received(folder / f"{format}.call", path)
                except Exception as error:  # importing the modules that it needs may raise anything
                    write_reason(folder / f"{format}{UNDELIVERED}", error)
                else:
                    answer(folder / format, run, inputs)


def answer(name: Path, run: Run, inputs: Arrays) -> None:
    """Writes the outputs for the inputs, or the error instead of them."""
    try:
        save_arrays(name.with_suffix(ANSWERS), run(inputs))
    except Exception as error:  # any error of a runtime is an answer too
        write_reason(name.with_suffix(ERROR), error)


def write_reason(path: Path, error: Exception) -> None:
    """Writes `reason` to a file that appears only when it is complete."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(reason(error), encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.modules["autocompress"] = None  # type: ignore[assignment]  # importing it fails from here on
    main()
