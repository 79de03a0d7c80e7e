"""Parses the notation of schemes: lists of sums such as ``StructPrune(min_keep=4)+Quantize16``.

A term may also be ``path/to/file.py:Name``, in quotes if the path contains ``+``, ``,``, brackets or quotes. The
text is parsed as a Python expression, in which placeholder names stand for the paths.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.plugins import is_in_file

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # whatever Python's parser may raise


@dataclass(frozen=True)
class Term:
    """One term of a sum: ``StructPrune(min_keep=4)``.

    Attributes:
        name: A registered name, or ``path/to/file.py:Name``.
        parameters: The values in brackets, by name.
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


_SPECIAL = ",+()[]{}'\""  # a path with one of these must be written in quotes
_IN_FILE = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?P<before>^|[,+])\s*(?P<name>[^,+()\[\]{}'"]+\.py:\w+)"""
)
_PLACEHOLDER = re.compile(r"\b_in_file_\d+_\b")


def _without_files(spec: str) -> tuple[str, dict[str, str]]:
    """Replaces each unquoted ``file.py:Name`` by a placeholder name, which makes the spec a Python expression.

    Returns:
        The expression, and for each placeholder the ``file.py:Name`` that it stands for.

    Raises:
        ValueError: If an existing file must be named in quotes and is not.
    """
    _refuse_unquoted(spec)
    in_files: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        if match["name"] is None:  # in quotes already
            return match[0]
        name = f"_in_file_{len(in_files)}_"
        in_files[name] = match["name"]
        return str(match["before"]) + name

    return _IN_FILE.sub(placeholder, spec.strip()), in_files


def _refuse_unquoted(spec: str) -> None:
    """Raises ValueError if an unquoted part of the spec is the path of a file that must be written in quotes."""
    starts = [0, *(match.end() for match in re.finditer(r"[,+]", spec))]
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
    """A scheme's name as it is written: in quotes if it is a path with special characters."""
    return repr(name) if set(name) & set(_SPECIAL) else name


def with_files(spec: str, files: Mapping[str, str]) -> str:
    """Replaces paths of files in a list of sums.

    Args:
        spec: The list as it was written.
        files: The new path for each path to replace.

    Raises:
        ValueError: As `terms`.
    """

    def moved(term: Term) -> Term:
        file, colon, name = term.name.rpartition(":")
        return Term(files.get(file, file) + colon + name, term.parameters)

    return ", ".join("+".join(str(moved(term)) for term in terms(scheme)) for scheme in listed(spec))


def listed(spec: str) -> list[str]:
    """Splits a spec at its commas, except those within brackets; ``[spec]`` if it cannot be parsed.

    Raises:
        ValueError: If a file in it must be named in quotes and is not.
    """
    text, in_files = _without_files(spec)
    try:
        parsed = ast.parse(f"[{text}]", mode="eval").body
        assert isinstance(parsed, ast.List)
        items = [ast.unparse(item) for item in parsed.elts]
        return [_PLACEHOLDER.sub(lambda name: in_files.get(name[0], name[0]), item) for item in items] or [spec]
    except UNREADABLE:
        return [spec]


def terms(spec: str) -> list[Term]:
    """Parses a sum such as ``StructPrune(min_keep=4)+Quantize16`` into its terms, in order.

    Raises:
        ValueError: If ``spec`` is not a sum, or a parameter is given twice or is not a plain value.
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
    """The summands of a (nested) sum, from left to right."""
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
    """The name that a node stands for: a name, a placeholder or a quoted ``file.py:Name``; None for any other."""
    if isinstance(node, ast.Name):
        return in_files.get(node.id, node.id)
    quoted = node.value if isinstance(node, ast.Constant) else None
    return quoted if isinstance(quoted, str) and is_in_file(quoted) else None


def literal(node: ast.expr, source: str) -> Any:
    """The value of a Python literal; a bare word counts as a string, as in ``dtype=bf16``.

    Args:
        node: The parsed value.
        source: The text that it was parsed from, for the error.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):  # TypeError: a list as a key; RecursionError: nested too deep
        written = (ast.get_source_segment(source, node) or "")[:100]
        raise ValueError(f"{written!r} is not a plain value; write a number or a word") from None
