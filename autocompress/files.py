"""What is written on disk as JSON, and how a study may be named there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of a study, which is the name of its folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON by way of a temporary file, so that ``path`` is old or new but never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads JSON.

    Raises:
        ValueError: If the file is not whole JSON; the message names it.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return value
