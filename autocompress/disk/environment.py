"""The provenance of a study: versions of packages, the machine, hashes of the data."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autocompress.splits import Split, TensorSplit
from autocompress.task import Task

PACKAGES = (
    "autocompress",
    "torch",
    "torchvision",
    "torch-pruning",
    "optuna",
    "mlflow",
    "numpy",
    "scikit-learn",
    "onnx",
    "onnxruntime",
    "nvidia-ml-py",
)
_IN_MEMORY_BYTES = 2 * 10**9  # larger data is not hashed, as that takes seconds


def provenance(task: Task, command: str | None) -> dict[str, Any]:
    """All that is needed to reproduce a study, beside its settings: JSON types only.

    Args:
        task: The task, whose splits are hashed if they are in memory.
        command: The command line; None if the study was started from Python.
    """
    splits = {"train": task.train, "val": task.val, "test": task.test}
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "data": {name: {"n": split.n_samples, "sha256": data_digest(split)} for name, split in splits.items()},
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the installed `PACKAGES`, on which results depend."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def machine() -> dict[str, str]:
    """The system, the processor, torch's number of threads, and the GPUs."""
    cores, threads = usable_cores(), torch.get_num_threads()
    parts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor()}, {cores} core{'s' * (cores != 1)}",
        "threads": f"at most {threads} thread{'s' * (threads != 1)}",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        parts["gpu"] = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return parts


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def data_digest(split: Split) -> str | None:
    """The SHA-256 of a split held in memory, samples then labels; None for others, which would be read whole."""
    if not isinstance(split, TensorSplit) or split.x.nbytes > _IN_MEMORY_BYTES:
        return None
    return tensors_digest({"x": split.x, "y": split.y})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors: their names, shapes, types and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
