"""What callers from Python give: numbers, texts, one or several of a kind, each checked in one line.

`takes` checks the arguments of a function, `check_fields` those of a frozen dataclass. Both say what was given and
what is allowed, and hand on plain types: NumPy's numbers become Python's, which JSON can hold.
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
    """What an argument may be.

    Attributes:
        what: It in words: ``"a whole number"``.
        take: What is handed on for what was given; raises TypeError where that is something else.
    """

    what: str
    take: Callable[[Any], Any]

    def such_as(self, example: str) -> "Kind":
        """The same with an example in its words."""
        return replace(self, what=f"{self.what}, such as {example}")

    def of(self, name: str, given: Any) -> Any:
        """What is handed on.

        Raises:
            ValueError: If something else was given, under this name.
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
    taken = _number(given)
    if taken != taken // 1:
        raise TypeError
    return int(taken)


def _path(given: Any) -> Any:
    if not os.fspath(given):  # pathlib would take it for the current folder
        raise TypeError
    return given


def _function(given: Any) -> Any:
    if not callable(given):
        raise TypeError
    return given


def instance(what: str, *kinds: Any) -> Kind:
    """An instance of one of some classes, which ``what`` says in words."""

    def take(given: Any) -> Any:
        if not isinstance(given, kinds):
            raise TypeError
        return given

    return Kind(what, take)


def optional(kind: Kind) -> Kind:
    """The same, or None."""
    return Kind(f"{kind.what}, or None", lambda given: None if given is None else kind.take(given))


def several(kind: Kind) -> Kind:
    """One of a kind, or any number of them: a tuple is handed on."""
    return Kind(f"{kind.what}, or a list of such", lambda given: tuple(map(kind.take, listing(given))))


def listing(given: Any) -> tuple[Any, ...]:
    """One or several as a tuple; a text is one, not its letters, and so is a mapping. None is none."""
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
    """Has arguments of a function be of some kinds; None may be given where it is the default. A decorator.

    Raises:
        ValueError: From the function, if one is not.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        assert kinds.keys() <= defaults.keys(), "each kind is of an argument"
        meant = {name: optional(kind) if defaults[name] is None else kind for name, kind in kinds.items()}

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # which Python refuses, with the function's name
            for name in meant.keys() & bound.arguments.keys():
                bound.arguments[name] = meant[name].of(name, bound.arguments[name])
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def check_fields(config: Any, **kinds: Kind) -> None:
    """Has fields of a frozen dataclass be of some kinds: to be called first in its ``__post_init__``.

    Raises:
        ValueError: If one is not.
    """
    for name, kind in kinds.items():
        object.__setattr__(config, name, kind.of(name, getattr(config, name)))
