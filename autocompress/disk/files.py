"""JSON files with a checksum, and the names of studies on disk and on the command line."""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST = 150  # characters of a study's name: file systems take 255 bytes, and files append to it
NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST - 1}}}"  # of a study, which is the name of its folder
LOCK = "lock"  # the lock file of the process that runs a study; in a trial's folder, of the one that runs that
DEFAULT_OUT = Path("autocompress-runs")  # the default folder of studies
SEAL = "seal"  # the key of a checksum of all other entries


def short(path: Path) -> Path:
    """The path relative to the current folder if it lies below it; otherwise unchanged."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def out_option(home: Path) -> str:
    """The option with which a command finds the studies in ``home`` from here: `` --out HOME``, or nothing."""
    path = short(home.absolute())
    return "" if path == DEFAULT_OUT else f" --out {shlex.quote(str(path))}"


def called(folder: Path) -> str:
    """The arguments with which a command finds a study from here: its name, and ``--out`` if needed."""
    return folder.name + out_option(folder.parent)


def write_json(path: Path, value: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Writes a JSON file atomically, by way of a temporary file.

    Args:
        path: The file.
        value: JSON types only.
        sealed: Whether to add a checksum, with which `read_json` refuses the file once it has changed.
    """
    if sealed:
        plain = json.loads(json.dumps(value, allow_nan=False))  # as it is read: JSON turns keys into strings
        value = {**plain, SEAL: _digest(plain)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # left if the disk is full


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file, checks its seal if it has one, and removes that.

    Raises:
        ValueError: If the file is not valid JSON, or differs from what was sealed; the message names it.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if isinstance(value, dict) and SEAL in value and value.pop(SEAL) != _digest(value):
        raise ValueError(f"{path} is damaged: its content is not what was written (seal)")
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
