"""Runs exported files in a fresh process that knows nothing of autocompress.

An exported file is worth offering only if it gives the same answers where it will be used: with torch or ONNX
Runtime alone. So a second Python loads it and runs it. That Python runs this very file as a script, by its
path, and the name autocompress is blocked in it.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Arrays: TypeAlias = list[NDArray[Any]]

TIMEOUT_S = 300.0

# ONNX Runtime's telemetry would leave files in the home directory; its import reads either name.
NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}


class FreshProcess:
    """A second Python that runs exported files while this one is still exporting. A context manager.

    It is started early and given each file as it is written, so that importing torch and loading the file
    cost little extra time. Whoever knows well before that a file will come calls `start_early`.

    Args:
        folder: An existing folder for what the two processes exchange.
        inputs: Batches to run each file on.
    """

    def __init__(self, folder: Path, inputs: Sequence[NDArray[Any]]) -> None:
        self._folder = folder
        save_arrays(folder / "inputs.npz", inputs)

    def __enter__(self) -> Self:
        self._process = _waiting.pop() if _waiting else _started()
        self._say(str(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, format: str, file: Path) -> None:
        """Has ``file`` loaded and run on the inputs; returns at once."""
        self._say([format, str(file)])

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        # A process that has died is reported by `finish`, with what it said last.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def finish(self, formats: Sequence[str]) -> dict[str, Arrays | str]:
        """Waits; for each format its outputs, one array per input, or in one line why there are none."""
        if not formats:
            return {}
        try:
            _, said = self._process.communicate(timeout=TIMEOUT_S)
            lost = f"the process that ran it died with code {self._process.returncode}: {_last_line(said)}"
        except subprocess.TimeoutExpired:
            lost = f"it had not answered after {TIMEOUT_S:.0f} s"
        return {format: self._outcome(format, lost) for format in formats}

    def _outcome(self, format: str, lost: str) -> Arrays | str:
        if (answers := self._folder / f"{format}.npz").exists():
            return load_arrays(answers)
        if (error := self._folder / f"{format}.error").exists():
            return error.read_text(encoding="utf-8")
        return lost


_waiting: list[subprocess.Popen[str]] = []  # processes that have no folder yet; they end with this one


def start_early() -> None:
    """Starts the process that the next `FreshProcess` uses."""
    if not _waiting:
        _waiting.append(_started())


def _started() -> subprocess.Popen[str]:
    # -P keeps this script's folder off the path: a module of autocompress must not stand in for another.
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | NO_TELEMETRY,
    )


def save_arrays(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    """Writes arrays to an .npz file that appears only when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, *arrays)
    partial.replace(path)


def load_arrays(path: Path) -> Arrays:
    """What `save_arrays` wrote, in order."""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{i}"] for i in range(len(stored.files))]


def reason(error: BaseException) -> str:
    """An error in one line: the root cause's, for exporters wrap it in pages of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
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


def main() -> None:
    """The fresh process: on stdin the folder, then one ``[format, path]`` a line until it closes."""
    import onnxruntime  # noqa: F401  imported while there is nothing to do yet
    import torch.export  # noqa: F401

    if not (said := sys.stdin.readline()):
        return
    folder = Path(json.loads(said))
    inputs = load_arrays(folder / "inputs.npz")
    for line in sys.stdin:
        format, file = json.loads(line)
        try:
            save_arrays(folder / f"{format}.npz", RUNNERS[format](Path(file), inputs))
        except Exception as error:  # whatever a runtime raises is the answer that was asked for
            (folder / f"{format}.error").write_text(reason(error), encoding="utf-8")


if __name__ == "__main__":
    sys.modules["autocompress"] = None  # type: ignore[assignment]  # importing it fails from here on
    main()
