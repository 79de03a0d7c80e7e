"""Finds schemes and objectives: registries by name, the entry points that fill them, and users' Python files.

The engine knows no scheme and no objective by name. Those that ship with autocompress are found in the same way as
a third party's: a module listed under ``[project.entry-points."autocompress.plugins"]`` registers what it defines
when it is imported.

A *spec* is the text that names such an object: a registered name, or ``path/to/file.py:name``. A study stores
specs as the user wrote them, and the absolute paths of the files, so that it can be resumed from any folder.
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

_FROM_FILES: dict[str, ModuleType] = {}  # modules run from users' files, and those beside them, by module name
_FILES: dict[str, str] = {}  # module name -> absolute path, of the files that `load_from_file` has run
_WRITTEN: dict[str, str] = {}  # absolute path -> path as the user first wrote it
_MODULES: dict[str, str] = {}  # module name -> absolute path, of modules imported from the current folder


@cache
def load_plugins() -> None:
    """Imports every installed plugin once. A plugin that fails to import is skipped, with a warning."""
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"the plugin {entry.name!r} ({entry.value}) was not loaded: {type(error).__name__}: {error}",
                stacklevel=2,
            )


class Registry(Generic[T]):
    """Objects of one kind by name, filled by plugins on first look-up.

    Args:
        kind: The kind in the words of users (``"scheme"``), for errors.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._modules: dict[str, str] = {}

    def add(self, name: str, item: T, definition: Any = None) -> None:
        """Registers ``item``. A module may register the same name again: a notebook cell may be run twice.

        Args:
            name: The name that users write.
            item: The object that `get` returns.
            definition: The user's class or function that ``item`` was made from, if ``item`` is not itself that.

        Raises:
            ValueError: If another module has registered the name.
        """
        module: str = (item if definition is None else definition).__module__
        owner = self._modules.get(name, module)
        if owner != module:
            raise ValueError(
                f"a {self.kind} named {name!r} is already registered, by {owner}; choose another name"
            )
        self._items[name], self._modules[name] = item, module

    def find(self, name: str) -> T | None:
        """The object registered under ``name``, or None."""
        load_plugins()
        return self._items.get(name)

    def get(self, name: str) -> T:
        """The object registered under ``name``.

        Raises:
            ValueError: If there is none; the message suggests close matches and lists all names.
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
    """Runs a Python file and returns the object that ``path/to/file.py:name`` names.

    The file is run at every call. Like a script, it may import modules from its own folder.

    Raises:
        ValueError: If the file does not exist, raises when it is run, or does not define the name.
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
    load_plugins()  # first, so that a name that the file registers cannot displace an installed plugin's
    try:
        module = _run(path)
        _FILES[module.__name__] = _record_path(file)
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
    """Imports a module that is installed or, as with ``python -m``, lies in the current folder.

    A study that is resumed imports its module from the folder that was current when the study was started, see
    `write_files_as`.

    Raises:
        Exception: Whatever the import raises.
    """
    here = _folder_of(name, _MODULES[name]) if name in _MODULES else Path.cwd()
    if str(here) not in sys.path:
        sys.path.append(str(here))  # last, so that it does not shadow installed packages
    module = importlib.import_module(name)
    if module.__file__ and _folder_of(name, module.__file__) == here:
        _MODULES[name] = module.__file__
    beside = _beside(here)
    if name in beside:
        _FROM_FILES.update(beside)
    return module


def _folder_of(module: str, file: str) -> Path:
    """The folder on ``sys.path`` from which the module called ``module`` is imported as ``file``."""
    depth = module.count(".") + (Path(file).name == "__init__.py")
    return Path(file).resolve().parents[depth]


def spec_of(definition: type) -> str:
    """The spec of a class: ``path/to/file.py:Name`` if `load_from_file` has loaded it, else its own name."""
    file = _FILES.get(definition.__module__)
    return f"{_WRITTEN.get(file, file)}:{definition.__name__}" if file else definition.__name__


def is_in_file(spec: str) -> bool:
    """Whether a spec has the form ``path/to/file.py:name``, whatever characters are in the path."""
    return re.fullmatch(r".+\.py:\w+", spec, re.DOTALL) is not None


def whole_spec(spec: str) -> str:
    """The spec ``path/to/file.py:name`` with the file's absolute path, which is valid in any folder."""
    file, _, name = spec.rpartition(":")
    return f"{Path(file).resolve()}:{name}"


def written_spec(spec: str) -> str:
    """A spec from `whole_spec` with the path as the user first wrote it, for tables and records."""
    file, _, name = spec.rpartition(":")
    return f"{_WRITTEN[file]}:{name}" if file in _WRITTEN else spec


class Named(Protocol):
    """A metric or an objective."""

    @property
    def name(self) -> str:
        """The name in tables."""

    @property
    def source(self) -> str:
        """Its spec as the user wrote it; empty if it does not come from a file."""

    @property
    def whole(self) -> str:
        """Its spec with an absolute path; empty if it does not come from a file."""


def name_of(named: Named) -> str:
    """The spec that a study stores: the file's path as it is written now, or else the name."""
    return written_spec(named.whole) if named.whole else named.source or named.name


def files_in(*specs: str) -> dict[str, str]:
    """The absolute paths of the files in some specs, by the path or the module name that is written there."""
    files = {path: whole for whole, path in _WRITTEN.items() if any(f"{path}:" in spec for spec in specs)}
    modules = {name: file for name, file in _MODULES.items() if any(spec.startswith(f"{name}:") for spec in specs)}
    return files | modules


def write_files_as(files: Mapping[str, str]) -> dict[str, str]:
    """Makes specs name files as a resumed study does, which may have been started in another folder.

    Args:
        files: The result of `files_in` when the study was started.

    Returns:
        The entries of ``files`` whose file still exists.
    """
    existing = {path: whole for path, whole in files.items() if Path(whole).is_file()}
    for path, whole in existing.items():
        if not path.endswith(".py"):
            _MODULES[path] = whole
            continue
        # another file that is written in the same way is from now on written with its absolute path
        _WRITTEN.update({other: other for other, written in _WRITTEN.items() if written == path})
        _WRITTEN[whole] = path
    return existing


def _record_path(file: str) -> str:
    """Records how a file that has been run is written, and returns its absolute path.

    It is written as given, unless another file is written so already.
    """
    whole, given = str(Path(file).resolve()), os.path.normpath(file)
    _WRITTEN.setdefault(whole, whole if given in _WRITTEN.values() else given)
    return whole


def modules_from_files() -> list[ModuleType]:
    """Modules run from users' files and imported from beside them, which other processes cannot import by name."""
    return list(_FROM_FILES.values())


def _run(path: Path) -> ModuleType:
    """Runs a file as a module whose name is unique to its path: two files called model.py are two modules."""
    digest = zlib.crc32(str(path.resolve()).encode())
    name = f"{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest:08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that it does not shadow installed packages
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _FROM_FILES.update(_beside(folder) | {name: module})
    return module


def _beside(folder: Path) -> dict[str, ModuleType]:
    """The imported modules that lie in a folder, by name: its files, and the packages in it with all they hold."""
    modules, here = list(sys.modules.items()), f"{folder}{os.sep}"
    files = {name: getattr(module, "__file__", None) for name, module in modules}
    tops = {
        name for name, file in files.items() if file in (f"{here}{name}.py", f"{here}{name}{os.sep}__init__.py")
    }
    return {name: module for name, module in modules if name.partition(".")[0] in tops}
