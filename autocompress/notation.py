"""How schemes are written: lists of sums such as ``StructPrune(min_keep=4)+Quantize16``, as names and values.

In the place of a name there may be ``path/to/file.py:Name``.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


_IN_FILE = re.compile(r"""(^|[,+])\s*([^,+()\[\]{}'"]+\.py:\w+)""")
_STAND_IN = re.compile(r"\b_in_file_\d+_\b")


def _without_files(spec: str) -> tuple[str, dict[str, str]]:
    """A spec in Python's syntax: for each ``file.py:Name`` there is a name, by which the second has it."""
    in_files: dict[str, str] = {}

    def stand_in(found: re.Match[str]) -> str:
        name = f"_in_file_{len(in_files)}_"
        in_files[name] = found[2]
        return found[1] + name

    return _IN_FILE.sub(stand_in, spec.strip()), in_files


def listed(spec: str) -> list[str]:
    """What commas part in ``spec``, but for those within brackets; ``spec`` itself where it cannot be read."""
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
    if not isinstance(function, ast.Name) or positional or any(keyword.arg is None for keyword in keywords):
        raise ValueError(
            f"{spec[:100]!r} is not a scheme; write names, parameters as Name(parameter=value), what is in "
            "files as path/to/file.py:Name"
        )
    name = in_files.get(function.id, function.id)
    parameters: dict[str, Any] = {}
    for keyword in keywords:
        assert keyword.arg is not None
        if keyword.arg in parameters:
            raise ValueError(f"{name} is given the parameter {keyword.arg!r} twice")
        parameters[keyword.arg] = literal(keyword.value, spec)
    return Term(name, parameters)


def literal(node: ast.expr, source: str) -> Any:
    """The value of a Python literal, or a bare word taken as a string: ``dtype=bf16``."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):  # the latter two where a list is a key, or it is endless
        written = (ast.get_source_segment(source, node) or "")[:100]
        raise ValueError(f"{written!r} is not a plain value; write a number or a word") from None
