"""How schemes are written: lists of sums such as ``StructPrune(min_keep=4)+Quantize16``, as names and values."""

import ast
from dataclasses import dataclass
from typing import Any

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # all of which Python's parser raises


@dataclass(frozen=True)
class Term:
    """One term of a sum: ``StructPrune(min_keep=4)``.

    Attributes:
        name: What it names.
        parameters: What is given with it, by name.
    """

    name: str
    parameters: dict[str, Any]


def listed(spec: str) -> list[str]:
    """What commas part in ``spec``, but for those within brackets; ``spec`` itself where it cannot be read."""
    try:
        found = ast.parse(f"[{spec.strip()}]", mode="eval").body
        assert isinstance(found, ast.List)
        return [ast.unparse(one) for one in found.elts] or [spec]
    except UNREADABLE:
        return [spec]


def terms(spec: str) -> list[Term]:
    """The terms of the sum that ``spec`` is, in order.

    Raises:
        ValueError: If it is none, or what is given with a name is no plain value or given twice.
    """
    try:
        parts = _parts(ast.parse(spec.strip(), mode="eval").body)
    except UNREADABLE:
        raise ValueError(
            f"{spec[:100]!r} is not a scheme; write a name, Name(parameter=value) or a sum of them such as "
            "StructPrune+Quantize16"
        ) from None
    return [_term(part, spec.strip()) for part in parts]


def _parts(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left) + _parts(node.right)
    return [node]


def _term(node: ast.expr, spec: str) -> Term:
    name, keywords = (node.func, node.keywords) if isinstance(node, ast.Call) else (node, [])
    positional = node.args if isinstance(node, ast.Call) else []
    if not isinstance(name, ast.Name) or positional or any(keyword.arg is None for keyword in keywords):
        raise ValueError(f"{spec[:100]!r} is not a scheme; write names, parameters as Name(parameter=value)")
    parameters: dict[str, Any] = {}
    for keyword in keywords:
        assert keyword.arg is not None
        if keyword.arg in parameters:
            raise ValueError(f"{name.id} is given the parameter {keyword.arg!r} twice")
        parameters[keyword.arg] = literal(keyword.value, spec)
    return Term(name.id, parameters)


def literal(node: ast.expr, source: str) -> Any:
    """The value of a Python literal, or a bare word taken as a string: ``dtype=bf16``."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):  # the latter two where a list is a key, or it is endless
        written = (ast.get_source_segment(source, node) or "")[:100]
        raise ValueError(f"{written!r} is not a plain value; write a number or a word") from None
