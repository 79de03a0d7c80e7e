"""Runtimes: what runs a model where it is deployed, and so what its latency is measured in."""

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
    """A runtime is not here, or does not take a model; the message says why in one line."""


def check_runtime(name: str, device: str | torch.device = "cpu") -> Runtime:
    """The runtime of that name.

    Raises:
        ValueError: If there is none, it is not installed, or it does not run on the device.
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
    """The runtimes in which a study shows its answer: the one that was asked for, and what is at hand at once.

    Compiling takes longer than many a study, so it is done where it was asked for.
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
    """What runs a model on batches in a runtime, ready to be timed.

    Args:
        runtime: Which one.
        model: In eval mode, as it is deployed, see `autocompress.networks.deployed.deployed`.
        x: A batch on the model's device.
        onnx_file: The model as ONNX where it is written already; ONNX Runtime then runs that very file.

    Raises:
        CannotRun: If the runtime is not here or does not take the model.
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
    """ONNX Runtime with its default settings and as many threads as torch has here.

    But for one: after a run its threads sleep. By default they go on looking for work for a while, which keeps the
    cores from the model whose turn it is, and costs a small one half of its speed.
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

    run(x)  # what does not take the model may say so only now
    return run
