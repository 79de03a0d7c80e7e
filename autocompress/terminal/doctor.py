"""Checks whether autocompress can work here, and what is missing. Needs no network."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import NamedTuple

import torch

from autocompress.disk.environment import machine, usable_cores, versions
from autocompress.disk.storage import prepare_out


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        what: The checked item.
        said: Its state, and what to do if something is missing.
        state: ``ok``; ``note`` if a feature is not available; ``problem`` if autocompress cannot work.
    """

    what: str
    said: str
    state: str = "ok"


def examine(out: Path) -> Iterator[Finding]:
    """Checks Python, the packages, the devices, and the folder of studies.

    Args:
        out: The folder of all studies.
    """
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    for name, number in versions().items():
        if name != "python":
            yield Finding(name, number)
    yield from _requirements()
    for what, description in machine().items():
        yield Finding(what, description)
    if torch.get_num_threads() > usable_cores():
        said = f"{torch.get_num_threads()} on {usable_cores()} cores; OMP_NUM_THREADS={usable_cores()} is faster"
        yield Finding("threads", said, "note")
    yield _cuda()
    yield _nvml()
    try:
        yield Finding("out", f"{prepare_out(out)} can be written")
    except ValueError as error:
        yield Finding("out", str(error), "problem")


def _requirements() -> Iterator[Finding]:
    """Findings on missing dependencies and incomplete extras."""
    try:
        required = distribution("autocompress").requires or []
    except PackageNotFoundError:
        yield Finding("autocompress", "is not installed; pip install it", "problem")
        return
    missing: dict[str, list[str]] = {}
    for requirement in required:
        name = re.match(r"[\w.-]+", requirement)
        extra_match = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and not _is_installed(name[0]):
            missing.setdefault(extra_match[1] if extra_match else "", []).append(name[0])
    for extra, names in missing.items():
        lacking = f"{', '.join(names)} not installed"
        if extra:
            yield Finding(f"extra {extra}", f"{lacking}; pip install 'autocompress[{extra}]'", "note")
        else:
            yield Finding("dependencies", f"{lacking}; pip install {' '.join(names)}", "problem")


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _cuda() -> Finding:
    if torch.version.cuda is None:
        return Finding("CUDA", "this build of torch is for the CPU only", "note")
    if not torch.cuda.is_available():
        return Finding("CUDA", f"torch is built for {torch.version.cuda} and finds no GPU that it can use", "note")
    return Finding("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)")


def _nvml() -> Finding:
    """A finding on NVML, which measures memory, utilization, power and energy of GPUs."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Finding("NVML", f"{error}: no GPU memory, utilization, power or energy is measured", "note")
    try:
        return Finding("NVML", f"driver {_text(pynvml.nvmlSystemGetDriverVersion())}")
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
