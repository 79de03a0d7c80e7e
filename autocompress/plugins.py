"""Finds schemes and objectives: registries by name, and the entry points that fill them.

The engine knows no scheme and no objective by name. Those that ship with autocompress come through the same
door as a third party's: a module listed under ``[project.entry-points."autocompress.plugins"]`` that
registers what it defines when it is imported.
"""

import difflib
import importlib
import importlib.util
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

ENTRY_POINT_GROUP = "autocompress.plugins"

T = TypeVar("T")

_FROM_FILES: dict[str, ModuleType] = {}
_FILES: dict[str, str] = {}  # of each of these modules, by its whole path
_WRITTEN: dict[str, str] = {}  # how each file is written, by its whole path: as it was given first
_MODULES: dict[str, str] = {}  # the files of modules that lie in the folder that was current, or is a study's


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
        self._modules: dict[str, str] = {}

    def add(self, name: str, item: T, definition: Any = None) -> None:
        """Registers ``item``; its own module may register the name again (a notebook cell run twice).

        Args:
            name: What users call it.
            item: What `get` returns.
            definition: The class or function that a user wrote, where ``item`` was made from one.

        Raises:
            ValueError: If another module's definition already has the name.
        """
        module: str = (item if definition is None else definition).__module__
        owner = self._modules.get(name, module)
        if owner != module:
            raise ValueError(
                f"a {self.kind} named {name!r} is already registered, by {owner}; choose another name"
            )
        self._items[name], self._modules[name] = item, module

    def find(self, name: str) -> T | None:
        """The thing of that name, or None."""
        load_plugins()
        return self._items.get(name)

    def get(self, name: str) -> T:
        """The thing of that name.

        Raises:
            ValueError: If there is none; the message suggests near matches and lists what there is.
        """
        item = self.find(name)
        if item is not None:
            return item
        names = {n.lower(): n for n in self._items}
        near = difflib.get_close_matches(name.lower(), names, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(names[n] for n in near)}?" if near else ""
        available = ", ".join(sorted(self._items)) or "none"
        raise ValueError(f"unknown {self.kind} {name!r}{hint} (available: {available})")

    def __iter__(self) -> Iterator[tuple[str, T]]:
        load_plugins()
        return iter(sorted(self._items.items()))


def load_from_file(spec: str) -> Any:
    """The object that ``path/to/file.py:name`` names. The file is run, each time it is asked for.

    It may import the modules that lie beside it, as a script may.

    Raises:
        ValueError: If the file does not exist, fails when it is run, or has no such name.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name:
        written = f"{spec.rstrip(':')}:name" if spec.rstrip(":").endswith(".py") else "path/to/file.py:name"
        raise ValueError(f"{spec!r} does not say which name of which file; write {written}")
    path = Path(file)
    if not path.is_file():
        hint = "" if path.suffix == ".py" else f"; name one, as path/to/file.py:{name}"
        raise ValueError(f"{spec!r}: there is no file {file!r}{hint}")
    if path.suffix != ".py":
        raise ValueError(f"{spec!r}: {file!r} is not a Python file; name a .py file")
    load_plugins()  # first, so that a name the file registers cannot push out an installed plugin's
    try:
        module = _run(path)
        _FILES[module.__name__] = _enter(file)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{spec!r}: running {file!r} raised {type(error).__name__}: {reason}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        public = (n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, ModuleType))
        has = ", ".join(sorted(public)) or "no public names"
        raise ValueError(f"{spec!r}: {file!r} has no {name!r}; it has {has}") from None


def import_from_here(name: str) -> ModuleType:
    """Imports a module that is installed or, as for ``python -m``, lies in the current folder.

    That of a study which is resumed comes from the folder that was current when it began, see `write_files_as`.

    Raises:
        Exception: Whatever the import raises.
    """
    here = _folder_of(name, _MODULES[name]) if name in _MODULES else Path.cwd()
    if str(here) not in sys.path:
        sys.path.append(str(here))  # behind all that is installed, which it shall not hide
    module = importlib.import_module(name)
    if module.__file__ and _folder_of(name, module.__file__) == here:
        _MODULES[name] = module.__file__
    beside = _beside(here)
    if name in beside:
        _FROM_FILES.update(beside)
    return module


def _folder_of(module: str, file: str) -> Path:
    """The folder in which a module is found by its name."""
    depth = module.count(".") + (Path(file).name == "__init__.py")
    return Path(file).resolve().parents[depth]


def spec_of(definition: type) -> str:
    """What names a class: ``path/to/file.py:Name`` of one that `load_from_file` has made, else its own name."""
    whole = _FILES.get(definition.__module__)
    return f"{_WRITTEN.get(whole, whole)}:{definition.__name__}" if whole else definition.__name__


def is_in_file(spec: str) -> bool:
    """Whether it is written as ``path/to/file.py:name``, whatever else is in the path."""
    return re.fullmatch(r".+\.py:\w+", spec, re.DOTALL) is not None


def whole_spec(spec: str) -> str:
    """``path/to/file.py:name`` with the file's whole path: what names it in any folder."""
    file, _, name = spec.rpartition(":")
    return f"{Path(file).resolve()}:{name}"


def written_spec(spec: str) -> str:
    """What `whole_spec` made, with the file's path as it was given first: what names it wherever it is seen."""
    file, _, name = spec.rpartition(":")
    return f"{_WRITTEN[file]}:{name}" if file in _WRITTEN else spec


class Named(Protocol):
    """A metric or an objective."""

    @property
    def name(self) -> str:
        """As it appears in tables."""

    @property
    def source(self) -> str:
        """Where it came from, as it is written."""

    @property
    def whole(self) -> str:
        """The same with a whole path, of one that came from a file."""


def name_of(one: Named) -> str:
    """What a study knows it by: where it came from, as that is written now; else its own name."""
    return written_spec(one.whole) if one.whole else one.source or one.name


def files_in(*specs: str) -> dict[str, str]:
    """The files that are named in some specs: by the path or the module that is written there, the whole path."""
    files = {path: whole for whole, path in _WRITTEN.items() if any(f"{path}:" in spec for spec in specs)}
    modules = {name: file for name, file in _MODULES.items() if any(spec.startswith(f"{name}:") for spec in specs)}
    return files | modules


def write_files_as(files: Mapping[str, str]) -> dict[str, str]:
    """Has files written as a study has them that is resumed, perhaps in another folder.

    Args:
        files: What `files_in` returned when it began.

    Returns:
        Those of them that are there still.
    """
    there = {path: whole for path, whole in files.items() if Path(whole).is_file()}
    for path, whole in there.items():
        if not path.endswith(".py"):
            _MODULES[path] = whole
            continue
        _WRITTEN.update({other: other for other, taken in _WRITTEN.items() if taken == path})
        _WRITTEN[whole] = path
    return there


def _enter(file: str) -> str:
    """The whole path of a file that has been run; it is written as it was given unless another one is."""
    whole, given = str(Path(file).resolve()), os.path.normpath(file)
    _WRITTEN.setdefault(whole, whole if given in _WRITTEN.values() else given)
    return whole


def modules_from_files() -> list[ModuleType]:
    """The modules that `load_from_file` has made, and those beside them: other processes may not have them."""
    return list(_FROM_FILES.values())


def _run(path: Path) -> ModuleType:
    """Runs a file as a module under a name of its own: two files called model.py are two modules."""
    digest = zlib.crc32(str(path.resolve()).encode())
    name = f"{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest:08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind all that is installed, which it shall not hide
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _FROM_FILES.update(_beside(folder) | {name: module})
    return module


def _beside(folder: Path) -> dict[str, ModuleType]:
    """The modules that have been imported from a folder itself: its files, and packages in it."""
    modules, here = list(sys.modules.items()), f"{folder}{os.sep}"
    files = {name: getattr(module, "__file__", None) for name, module in modules}
    tops = {
        name for name, file in files.items() if file in (f"{here}{name}.py", f"{here}{name}{os.sep}__init__.py")
    }
    return {name: module for name, module in modules if name.partition(".")[0] in tops}
