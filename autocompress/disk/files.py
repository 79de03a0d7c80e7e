"""What is written on disk as JSON, and how a study is named: there, and from the command line."""

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST = 150  # characters of a name: file systems take 255 bytes, and others put something after it
NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST - 1}}}"  # of a study, which is the name of its folder
LOCK = "lock"  # the file that whoever runs a study holds; in the folder of a trial, whoever runs that
DEFAULT_OUT = Path("autocompress-runs")  # where studies lie unless told otherwise
SEAL = "seal"  # the key of a digest of all the rest: a bit that flips on a disk is noticed


def short(path: Path) -> Path:
    """The path as seen from the current folder, if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def out_option(home: Path) -> str:
    """What makes a command find the studies in ``home`` from here: nothing, or `` --out HOME``."""
    seen = short(home.absolute())
    return "" if seen == DEFAULT_OUT else f" --out {shlex.quote(str(seen))}"


def called(folder: Path) -> str:
    """A study as a command finds it from here: its name, and ``--out`` where that is needed."""
    return folder.name + out_option(folder.parent)


def write_json(path: Path, value: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Writes JSON by way of a temporary file, so that ``path`` is old or new but never half.

    Args:
        path: The file.
        value: JSON types only.
        sealed: Whether nobody else may change it: `read_json` will refuse it then.
    """
    if sealed:
        plain = json.loads(json.dumps(value, allow_nan=False))  # a key that is a number is text there
        value = {**plain, SEAL: _digest(plain)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # of a disk that is full


def read_json(path: Path) -> dict[str, Any]:
    """Reads JSON, without its seal. A file without one is taken as it is.

    Raises:
        ValueError: If the file is not whole JSON, or not what was sealed; the message names it.
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
