"""Runtimes: the software that runs a deployed model, and in which its latency is measured."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from autocompress.formats.onnx_export import quietly, weight_dtype, write_onnx
from autocompress.formats.parity import NO_TELEMETRY, reason
from autocompress.showing.comparison import RUNTIMES as NAMES

Runtime: TypeAlias = Literal["eager", "compile", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
Run: TypeAlias = Callable[[Tensor], object]


class CannotRun(ValueError):
    """A runtime is not installed here, or does not accept a model; the message says why in one line."""


def check_runtime(name: str, device: str | torch.device = "cpu") -> Runtime:
    """The runtime of a name.

    Raises:
        ValueError: If there is none of that name, it is not installed, or it does not run on the device.
    """
    for runtime in RUNTIMES:
        if name == runtime:
            if reason := _missing(runtime, torch.device(device)):
                raise ValueError(f"runtime={name!r}: {reason}")
            return runtime
    raise ValueError(f"runtime={name!r}; it must be one of {', '.join(RUNTIMES)}")


def installed(device: str | torch.device) -> tuple[Runtime, ...]:
    """The runtimes that can run models on a device here."""
    return tuple(runtime for runtime in RUNTIMES if not _missing(runtime, torch.device(device)))


def shown_runtimes(asked: str, device: str | torch.device) -> tuple[str, ...]:
    """The runtimes in which a study measures its answer: the one asked for, and all others but ``compile``.

    Compiling can take longer than the study, so it is done only where it was asked for.
    """
    return tuple(dict.fromkeys((asked, *(name for name in installed(device) if name != "compile"))))


@cache
def _missing(runtime: Runtime, device: torch.device) -> str:
    """Why a runtime cannot be used on a device; empty if it can."""
    if runtime == "compile" and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler such as g++, and there is none on the PATH"
    if runtime == "onnxruntime":
        if find_spec("onnxruntime") is None:
            return "ONNX Runtime is not installed; pip install onnxruntime"
        if device.type != "cpu":
            return "ONNX Runtime is measured on the CPU; use --profile-device cpu"
    return ""


def prepare(runtime: Runtime, model: nn.Module, x: Tensor, onnx_file: Path | None = None) -> Run:
    """Prepares a model in a runtime: returns a function of a batch that can be timed.

    Args:
        runtime: The runtime.
        model: The model in eval mode, as it is deployed, see `autocompress.networks.deployed.deployed`.
        x: A batch on the model's device.
        onnx_file: The model's ONNX file if it is written already; ONNX Runtime then runs that file.

    Raises:
        CannotRun: If the runtime is not installed here or does not accept the model.
    """
    if missing := _missing(runtime, x.device):
        raise CannotRun(missing)
    if runtime != "onnxruntime" and weight_dtype(model) == torch.int8:
        raise CannotRun("PyTorch only simulates its 8-bit integers; measure it with the runtime onnxruntime")
    if runtime == "eager":
        return model
    try:
        with quietly():
            return _compiled(model, x) if runtime == "compile" else _session(model, x, onnx_file)
    except Exception as error:  # a compiler or an exporter may raise anything
        raise CannotRun(f"{NAMES[runtime]} does not take this model: {reason(error)}") from error


def _compiled(model: nn.Module, x: Tensor) -> Run:
    compiled: Run = torch.compile(model, dynamic=False)
    compiled(x)
    return compiled


def _session(model: nn.Module, x: Tensor, file: Path | None) -> Run:
    """A session of ONNX Runtime with as many threads as torch, in its default settings but for one.

    Its threads sleep after a run. By default they spin for a while, which occupies the cores during the next
    model's turn, and can halve the speed of a small model.
    """
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            file = Path(folder) / "model.onnx"
            plain = x[:1].expand(2, *x.shape[1:]).contiguous()
            write_onnx(model, torch.zeros_like(plain, memory_format=torch.contiguous_format), file)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> object:
        return session.run(None, {"input": batch.numpy()})

    run(x)  # some errors show only when the model runs
    return run
