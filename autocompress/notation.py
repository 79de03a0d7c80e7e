"""How schemes are written: lists of sums such as ``StructPrune(min_keep=4)+Quantize16``, as names and values.

In the place of a name there may be ``path/to/file.py:Name``; in quotes where the path has ``+``, ``,``, brackets
or quotes itself.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.plugins import is_in_file

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # all of which Python's parser raises


@dataclass(frozen=True)
class Term:
    """One term of a sum: ``StructPrune(min_keep=4)``.

    Attributes:
        name: What it names: a name, or ``path/to/file.py:Name``.
        parameters: What is given with it, by name.
    """

    name: str
    parameters: dict[str, Any]

    @property
    def is_in_file(self) -> bool:
        """Whether it names something in a file."""
        return ":" in self.name

    def __str__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        name = in_quotes(self.name)
        return f"{name}({parameters})" if parameters else name


_SPECIAL = ",+()[]{}'\""  # what a path has that must be in quotes
_IN_FILE = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?P<before>^|[,+])\s*(?P<name>[^,+()\[\]{}'"]+\.py:\w+)"""
)
_STAND_IN = re.compile(r"\b_in_file_\d+_\b")


def _without_files(spec: str) -> tuple[str, dict[str, str]]:
    """A spec in Python's syntax: for each bare ``file.py:Name`` there is a name, by which the second has it.

    Raises:
        ValueError: If there is a file of such a path that it can only be named in quotes, and it is not in any.
    """
    _refuse_bare(spec)
    in_files: dict[str, str] = {}

    def stand_in(found: re.Match[str]) -> str:
        if found["name"] is None:  # in quotes already
            return found[0]
        name = f"_in_file_{len(in_files)}_"
        in_files[name] = found["name"]
        return str(found["before"]) + name

    return _IN_FILE.sub(stand_in, spec.strip()), in_files


def _refuse_bare(spec: str) -> None:
    starts = [0, *(found.end() for found in re.finditer(r"[,+]", spec))]
    for end in re.finditer(r"\.py:\w+", spec):
        for start in starts:
            name = spec[start : end.end()].strip()
            path = name.rpartition(":")[0]
            if set(path) & set(_SPECIAL) and Path(path).is_file():
                raise ValueError(
                    f"the path {path!r} has one of {' '.join(_SPECIAL)}, which mean something in a scheme; write "
                    f"{name!r}, with these quotes and, for a shell, others around it"
                )


def in_quotes(name: str) -> str:
    """A scheme's name as it is written: in quotes where it is a path with characters that mean something."""
    return repr(name) if set(name) & set(_SPECIAL) else name


def with_files(spec: str, files: Mapping[str, str]) -> str:
    """A list of sums with other files in the place of some.

    Args:
        spec: What was written.
        files: For each path in it what is to be there.

    Raises:
        ValueError: As `terms`.
    """

    def moved(term: Term) -> Term:
        file, colon, name = term.name.rpartition(":")
        return Term(files.get(file, file) + colon + name, term.parameters)

    return ", ".join("+".join(str(moved(term)) for term in terms(one)) for one in listed(spec))


def listed(spec: str) -> list[str]:
    """What commas part in ``spec``, but for those within brackets; ``spec`` itself where it cannot be read.

    Raises:
        ValueError: If a file in it must be in quotes.
    """
    text, in_files = _without_files(spec)
    try:
        found = ast.parse(f"[{text}]", mode="eval").body
        assert isinstance(found, ast.List)
        written = [ast.unparse(one) for one in found.elts]
        return [_STAND_IN.sub(lambda name: in_files.get(name[0], name[0]), one) for one in written] or [spec]
    except UNREADABLE:
        return [spec]


def terms(spec: str) -> list[Term]:
    """The terms of the sum that ``spec`` is, in order.

    Raises:
        ValueError: If it is none, or what is given with a name is no plain value or given twice.
    """
    text, in_files = _without_files(spec)
    try:
        parts = _parts(ast.parse(text, mode="eval").body)
    except UNREADABLE:
        raise ValueError(
            f"{spec[:100]!r} is not a scheme; write a name, Name(parameter=value), path/to/file.py:Name or a sum "
            "of them such as StructPrune+Quantize16"
        ) from None
    return [_term(part, text, in_files) for part in parts]


def _parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left) + _parts(node.right)
    return [node]


def _term(node: ast.expr, spec: str, in_files: Mapping[str, str]) -> Term:
    function, keywords = (node.func, node.keywords) if isinstance(node, ast.Call) else (node, [])
    positional = node.args if isinstance(node, ast.Call) else []
    name = _name(function, in_files)
    if name is None or positional or any(keyword.arg is None for keyword in keywords):
        raise ValueError(
            f"{spec[:100]!r} is not a scheme; write names, parameters as Name(parameter=value), what is in "
            "files as path/to/file.py:Name"
        )
    parameters: dict[str, Any] = {}
    for keyword in keywords:
        assert keyword.arg is not None
        if keyword.arg in parameters:
            raise ValueError(f"{name} is given the parameter {keyword.arg!r} twice")
        parameters[keyword.arg] = literal(keyword.value, spec)
    return Term(name, parameters)


def _name(node: ast.expr, in_files: Mapping[str, str]) -> str | None:
    """What a name, or ``file.py:Name`` in quotes, says; None of anything else."""
    if isinstance(node, ast.Name):
        return in_files.get(node.id, node.id)
    quoted = node.value if isinstance(node, ast.Constant) else None
    return quoted if isinstance(quoted, str) and is_in_file(quoted) else None


def literal(node: ast.expr, source: str) -> Any:
    """The value of a Python literal, or a bare word taken as a string: ``dtype=bf16``."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):  # the latter two where a list is a key, or it is endless
        written = (ast.get_source_segment(source, node) or "")[:100]
        raise ValueError(f"{written!r} is not a plain value; write a number or a word") from None
