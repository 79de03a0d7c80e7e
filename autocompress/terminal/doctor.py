"""Whether autocompress can work here, and what is missing. Asks no network."""

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
    """One thing that was looked at.

    Attributes:
        what: What was looked at.
        said: What was found, and what to do where something is missing.
        state: ``ok``, ``note`` for what limits what can be done, or ``problem``.
    """

    what: str
    said: str
    state: str = "ok"


def examine(out: Path) -> Iterator[Finding]:
    """Looks at Python, the packages, the devices, and the folder for studies.

    Args:
        out: The folder for all studies; made if it is not there.
    """
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    found = versions()
    for name, number in found.items():
        if name != "python":
            yield Finding(name, number)
    yield from _requirements()
    for what, said in machine().items():
        yield Finding(what, said)
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
    """Dependencies that are missing, and the extras that are not complete."""
    try:
        required = distribution("autocompress").requires or []
    except PackageNotFoundError:
        yield Finding("autocompress", "is not installed; pip install it", "problem")
        return
    missing: dict[str, list[str]] = {}
    for requirement in required:
        name = re.match(r"[\w.-]+", requirement)
        of_extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if name and not _is_installed(name[0]):
            missing.setdefault(of_extra[1] if of_extra else "", []).append(name[0])
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
    """Whether memory, utilization, power and energy of a GPU can be measured."""
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
