"""Finds schemes and objectives: registries by name, and the entry points that fill them.

The engine knows no scheme and no objective by name. Those that ship with autocompress come through the same
door as a third party's: a module listed under ``[project.entry-points."autocompress.plugins"]`` that
registers what it defines when it is imported.
"""

import difflib
import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

ENTRY_POINT_GROUP = "autocompress.plugins"

T = TypeVar("T")


@cache
def load_plugins() -> None:
    """Imports every installed plugin once. One that fails is named in a warning and costs only itself."""
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"the plugin {entry.name!r} ({entry.value}) was not loaded: {type(error).__name__}: {error}",
                stacklevel=2,
            )


class Registry(Generic[T]):
    """Named things of one kind, filled by plugins on first look-up.

    Args:
        kind: What is registered, as users call it (``"scheme"``).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Registers ``item``; the same definition may be registered again (a notebook cell run twice).

        Raises:
            ValueError: If another module's definition already has the name.
        """
        known = self._items.get(name)
        if known is not None and _origin(known) != _origin(item):
            raise ValueError(f"a {self.kind} named {name!r} is already registered; choose another name")
        self._items[name] = item

    def get(self, name: str) -> T:
        """The thing of that name.

        Raises:
            ValueError: If there is none; the message suggests near matches and lists what there is.
        """
        load_plugins()
        if name in self._items:
            return self._items[name]
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in self._items], n=2, cutoff=0.5)
        guesses = [n for n in self._items if n.lower() in near]
        hint = f"; did you mean {' or '.join(guesses)}?" if guesses else ""
        raise ValueError(f"unknown {self.kind} {name!r}{hint} (available: {', '.join(sorted(self._items))})")

    def __iter__(self) -> Iterator[tuple[str, T]]:
        load_plugins()
        return iter(sorted(self._items.items()))


def _origin(item: object) -> object:
    return getattr(item, "__module__", None)


def load_from_file(spec: str) -> Any:
    """The object that ``path/to/file.py:name`` names.

    Raises:
        ValueError: If the file does not exist, fails when it is run, or has no such name.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{spec!r}: there is no file {file!r}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{spec!r}: {file!r} is not a Python file; name a .py file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{spec!r}: running {file!r} raised {type(error).__name__}: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        public = sorted(n for n in vars(module) if not n.startswith("_"))
        raise ValueError(f"{spec!r}: {file!r} has no {name!r}; it has {', '.join(public)}") from None
