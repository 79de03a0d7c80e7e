"""Patterns that select modules by name, glob or type, and settings that differ between modules."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

T = TypeVar("T")


class PerModule(dict[str, T]):
    """A setting by pattern, as a hashable mapping; where several patterns match a module, the first one counts."""

    def __hash__(self) -> int:  # type: ignore[override]  # schemes are frozen, and nothing changes it in one
        return hash(frozenset(self.items()))


def modules_matching(model: nn.Module, patterns: Iterable[str], parameter: str) -> set[str]:
    """The names of the modules that match a pattern, and of all modules inside of them.

    Args:
        model: The model.
        patterns: Each the name of a module, a glob (``layer1.*``) or the name of a type (``Linear``).
        parameter: What the patterns were given as, for the error.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    modules = dict(model.named_modules())
    matching: set[str] = set()
    for pattern in patterns:
        found = [n for n, module in modules.items() if fnmatchcase(n, pattern) or type(module).__name__ == pattern]
        if not found:
            has = ", ".join(name for name, _ in model.named_children()) or type(model).__name__
            raise ValueError(
                f"{parameter} names {pattern!r}, which matches no module; give a module's name, a glob or a type "
                f"(the model has: {has})"
            )
        matching |= {n for n in modules if any(f in ("", n) or n.startswith(f"{f}.") for f in found)}
    return matching


def per_module(
    model: nn.Module, setting: T | Mapping[str, T], otherwise: T, parameter: str
) -> tuple[dict[str, T], T]:
    """A setting's value for each module that its patterns match, by name, and its value for all other modules.

    Args:
        model: The model.
        setting: One value for all modules, or values by pattern.
        otherwise: The value for modules that no pattern matches.
        parameter: The name of the setting, for the error.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    if not isinstance(setting, Mapping):
        return {}, setting
    named: dict[str, T] = {}
    for pattern, value in reversed(list(setting.items())):  # so that the first pattern has the last word
        named |= dict.fromkeys(modules_matching(model, [pattern], parameter), value)
    return named, otherwise


def checked_skip(skip: Iterable[str] | str) -> tuple[str, ...]:
    """The patterns of a ``skip`` parameter as a tuple; a single one need not be in a list.

    Raises:
        ValueError: If they are not strings.
    """
    patterns = (skip,) if isinstance(skip, str) else tuple(skip) if isinstance(skip, list | tuple) else (None,)
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"skip={skip!r}; it must be a list of modules' names, globs or types, as ['layer1.*']")
    return tuple(str(pattern) for pattern in patterns)


def checked_min_keep(min_keep: int | Mapping[str, int], unit: str) -> int | PerModule[int]:
    """The floor, or the floors by pattern, of a ``min_keep`` parameter.

    Args:
        min_keep: The parameter's value.
        unit: What is counted ("channel"), for the error.

    Raises:
        ValueError: If a floor is not a whole number from 1 up.
    """
    floors = PerModule(min_keep) if isinstance(min_keep, Mapping) else min_keep
    values = floors.values() if isinstance(floors, PerModule) else [floors]
    if not all(isinstance(value, int) and value >= 1 for value in values):
        raise ValueError(
            f"min_keep={min_keep!r}; every layer must keep at least 1 {unit}: give a whole number, or a mapping "
            "from patterns to whole numbers"
        )
    return floors
