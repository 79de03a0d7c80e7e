"""Runs exported files in a fresh process that knows nothing of autocompress.

An exported file is worth offering only if it gives the same answers where it will be used: with torch or ONNX
Runtime alone. So a second Python loads it and runs it. That Python runs this very file as a script, by its
path, and the name autocompress is blocked in it. What needs autocompress is called there when the others are done.
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
GETS_READY_S = 60.0  # in which a process that waits must have run what it was asked, or another is started
ENDINGS = ANSWERS, ERROR, UNDELIVERED = ".npz", ".error", ".undelivered"  # of the files that come back

# ONNX Runtime's telemetry would leave files in the home directory; its import reads either name.
NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}


class Undelivered(str):
    """Why a call was not made: what it is made of cannot be made again in a fresh process."""


class FreshProcess:
    """A second Python that runs exported files while this one is still exporting. A context manager.

    It is started early and given each file as it is written, so that importing torch and loading the file
    cost little extra time. One that has run something before is quicker still, see `have_waiting`.

    Args:
        folder: An existing folder for what the two processes exchange.
        inputs: Batches to run each file on.
    """

    def __init__(self, folder: Path, inputs: Sequence[NDArray[Any]]) -> None:
        self._folder = folder
        self._runs: dict[str, _Python] = {}  # who runs what, by format
        save_arrays(folder / "inputs.npz", inputs)

    def __enter__(self) -> Self:
        self._python = _taken() or _Python()
        self._python.serve(self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        for python in {self._python, *self._runs.values()}:
            python.wait_again()

    def start(self, format: str, file: Path) -> None:
        """Has ``file`` loaded and run on the inputs; returns at once."""
        self._runs[format] = self._python
        self._python.ask(format, [format, str(file)])

    def start_call(self, format: str, call: bytes) -> None:
        """Has a pickled ``(function, arguments)`` called with the inputs, which are its last argument.

        The function may use autocompress and whatever can be imported here. So it comes last: what is started
        after it is not known to run without.
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
        """Waits; for each format its outputs, one array per input, or in one line why there are none."""
        end = time.monotonic() + TIMEOUT_S
        return {format: self._outcome(format, end) for format in formats}

    def _outcome(self, format: str, end: float) -> Arrays | str:
        python = self._runs[format]
        python.has_answered([format], end - time.monotonic())
        if (answers := self._folder / f"{format}{ANSWERS}").exists():
            return load_arrays(answers)
        for ending, kind in ((ERROR, str), (UNDELIVERED, Undelivered)):
            if (said := self._folder / f"{format}{ending}").exists():
                return kind(said.read_text(encoding="utf-8"))
        return python.last_words or f"it had not answered after {TIMEOUT_S:.0f} s"


class _Python:
    """A process that runs what it is told to.

    Args:
        waits: Whether it waits for another export when it is done with one.

    Attributes:
        knows: Whether it may have imported autocompress: then it tells nothing of what runs without.
    """

    def __init__(self, *, waits: bool = False) -> None:
        self.knows, self._waits = False, waits
        self._process, self._said = _started()

    def serve(self, folder: Path) -> None:
        """Has what follows exchanged in this folder, where the inputs are."""
        self._folder: Path = folder
        self._asked: list[str] = []
        self._say(str(folder))

    def ask(self, format: str, what: object) -> None:
        """Has it run something; the answer will be of this name."""
        self._asked.append(format)
        self._say(what)

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        # Of one that has died there are `last_words`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def last_words(self) -> str:
        """How it has ended, in one line; empty where it has not."""
        if self.is_alive:
            return ""
        self._said.seek(0)
        said = _last_line(self._said.read().decode(errors="replace"))
        return f"the process that ran it died with code {self._process.returncode}: {said}"

    def has_answered(self, formats: Sequence[str], timeout_s: float) -> bool:
        """Waits for all of these, or for its end; whether they are there."""
        end = time.monotonic() + timeout_s
        while True:
            ended = not self.is_alive  # asked first: it may answer just before
            if all(any((self._folder / f"{format}{ending}").exists() for ending in ENDINGS) for format in formats):
                return True
            if ended or time.monotonic() >= end:
                return False
            time.sleep(0.01)

    def is_ready(self, timeout_s: float) -> bool:
        """Waits for all that it was asked; whether it can be asked for more."""
        return self.has_answered(self._asked, timeout_s) and self.is_alive

    def wait_again(self) -> None:
        """Lets it wait for the next export, or ends it."""
        if self._waits and self.is_ready(0):
            self._asked = []  # what it has answered may be removed
            _waiting.append(self)
        else:
            self.end()

    def end(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._said.close()


# At most one that knows autocompress and one that does not; they end with this process.
_waiting: list[_Python] = []


def have_waiting(folder: Path, files: Mapping[str, Path], inputs: Sequence[NDArray[Any]]) -> None:
    """Sees to it that a process waits for the next `FreshProcess`, and has run something first. Returns at once.

    It waits again after each export. What runs without autocompress is never asked of one that has imported it:
    there are two of them in the end.

    Args:
        folder: In which the two exchange what goes again.
        files: What it runs, by format.
        inputs: On what, as for `FreshProcess`.
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
    """One of `_waiting`, once it has run what it was asked, and unless it has died there."""
    for one in [one for one in _waiting if one.knows == knowing]:
        _waiting.remove(one)
        if one.is_ready(GETS_READY_S):
            return one
        one.end()
    return None


def _started() -> tuple[subprocess.Popen[str], IO[bytes]]:
    """A process, and the file of what it says on stderr."""
    said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
    # -P keeps this script's folder off the path: a module of autocompress must not stand in for another.
    command = [sys.executable, "-P", __file__]
    environment = os.environ | NO_TELEMETRY
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, text=True, env=environment
    )
    return process, said


def save_arrays(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    """Writes arrays to an .npz file that appears only when it is complete."""
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.savez(file, *arrays)
    unfinished.replace(path)


def load_arrays(path: Path) -> Arrays:
    """What `save_arrays` wrote, in order."""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{i}"] for i in range(len(stored.files))]


def reason(error: BaseException) -> str:
    """An error in one line: the root cause's, for exporters wrap it in pages of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # what it announces is what counts
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
    """The call in a file, from here on with autocompress and with this module search path."""
    if sys.modules.get("autocompress", main) is None:  # it was blocked
        del sys.modules["autocompress"]
    sys.path[:] = path
    function, arguments = pickle.loads(call.read_bytes())
    return partial(function, *arguments)


def main() -> None:
    """The fresh process: on stdin a folder, then one file or call a line, and again until it closes."""
    import onnxruntime  # noqa: F401  imported while there is nothing to do yet
    import torch.export  # noqa: F401

    for line in sys.stdin:
        match json.loads(line):
            case str(said):
                folder = Path(said)
                inputs = load_arrays(folder / "inputs.npz")
            case [format, file]:
                answer(folder / format, partial(RUNNERS[format], Path(file)), inputs)
            case {"format": format, "path": path}:
                try:
                    run = received(folder / f"{format}.call", path)
                except Exception as error:  # whatever the modules raise that it needs
                    write_reason(folder / f"{format}{UNDELIVERED}", error)
                else:
                    answer(folder / format, run, inputs)


def answer(name: Path, run: Run, inputs: Arrays) -> None:
    """Writes what it gives for the inputs, or why it gives nothing."""
    try:
        save_arrays(name.with_suffix(ANSWERS), run(inputs))
    except Exception as error:  # whatever a runtime raises is the answer that was asked for
        write_reason(name.with_suffix(ERROR), error)


def write_reason(path: Path, error: Exception) -> None:
    """Writes `reason` to a file that appears only when it is complete."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(reason(error), encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.modules["autocompress"] = None  # type: ignore[assignment]  # importing it fails from here on
    main()
