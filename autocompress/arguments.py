"""Checks the types of arguments that callers pass from Python, with one-line errors.

`takes` checks the arguments of a function, `check_fields` the fields of a frozen dataclass. The error says what
was given and what is allowed. Values are converted to plain types: NumPy's numbers become Python's, which JSON can
hold.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A type of argument.

    Attributes:
        what: The type in words, for the error: ``"a whole number"``.
        take: Converts a given value to the value that the function receives; raises TypeError for any other type.
    """

    what: str
    take: Callable[[Any], Any]

    def such_as(self, example: str) -> "Kind":
        """The same type, described with an example."""
        return replace(self, what=f"{self.what}, such as {example}")

    def convert(self, name: str, given: Any) -> Any:
        """The value that the function receives for the argument ``name``.

        Raises:
            ValueError: If ``given`` is of another type.
        """
        try:
            return self.take(given)
        except TypeError:
            raise ValueError(f"{name}={_shown(given)}; it must be {self.what}") from None


def _shown(given: Any) -> str:
    shown = " ".join(repr(given).split())
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _number(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError
    return int(given) if isinstance(given, Integral) else float(given)


def _whole(given: Any) -> int:
    value = _number(given)
    if value != value // 1:
        raise TypeError
    return int(value)


def _path(given: Any) -> Any:
    if not os.fspath(given):  # pathlib would take it for the current folder
        raise TypeError
    return given


def _function(given: Any) -> Any:
    if not callable(given):
        raise TypeError
    return given


def instance(what: str, *kinds: Any) -> Kind:
    """An instance of one of the classes ``kinds``; ``what`` describes them in words."""

    def take(given: Any) -> Any:
        if not isinstance(given, kinds):
            raise TypeError
        return given

    return Kind(what, take)


def optional(kind: Kind) -> Kind:
    """The given type, or None."""
    return Kind(f"{kind.what}, or None", lambda given: None if given is None else kind.take(given))


def several(kind: Kind) -> Kind:
    """One value of a type or an iterable of them; the function receives a tuple."""
    return Kind(f"{kind.what}, or a list of such", lambda given: tuple(map(kind.take, listing(given))))


def listing(given: Any) -> tuple[Any, ...]:
    """One value or several, as a tuple: a string or a mapping counts as one value, None as no value."""
    if given is None:
        return ()
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return (given,)
    return tuple(given)


whole = Kind("a whole number", _whole)
number = Kind("a number", _number)
text = instance("a text", str)
flag = instance("True or False", bool)
path = Kind("a path", _path)
function = Kind("a function", _function)


def takes(**kinds: Kind) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function so that it checks and converts its arguments. None is allowed where it is the default.

    Args:
        kinds: The type of each argument, by its name.

    Raises:
        ValueError: From the decorated function, if an argument is of another type.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        assert kinds.keys() <= defaults.keys(), "each type belongs to an argument"
        allowed = {name: optional(kind) if defaults[name] is None else kind for name, kind in kinds.items()}

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # raises Python's own TypeError, which names the function
            for name in allowed.keys() & bound.arguments.keys():
                bound.arguments[name] = allowed[name].convert(name, bound.arguments[name])
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def check_fields(config: Any, **kinds: Kind) -> None:
    """Checks and converts fields of a frozen dataclass; call it first in ``__post_init__``.

    Args:
        config: The dataclass instance.
        kinds: The type of each field to check, by its name.

    Raises:
        ValueError: If a field is of another type.
    """
    for name, kind in kinds.items():
        object.__setattr__(config, name, kind.convert(name, getattr(config, name)))
