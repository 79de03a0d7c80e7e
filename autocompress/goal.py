"""Objective: what the search makes as small (or large) as it can within the accuracy bound."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias

from autocompress.measurement import Measurement
from autocompress.plugins import Registry, load_from_file

Direction = Literal["minimize", "maximize"]
Function: TypeAlias = Callable[[Measurement], float | None]


class ObjectiveError(ValueError):
    """An objective gave no finite number."""


@dataclass(frozen=True)
class Objective:
    """A number to optimize, computed from a `Measurement`.

    Attributes:
        name: As it appears in tables and logs.
        function: Maps a measurement to the number, or to None when it lacks what the number is made of.
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The number's unit, for tables; empty when it has none.
        source: ``file.py:name`` where it came from a file: what finds it again when a study is resumed.
    """

    name: str
    function: Function
    direction: Direction = "minimize"
    unit: str = ""
    source: str = ""

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickled by file or name where it has one: by then its function's own name is the objective's."""
        if self.source:
            return as_objective, (self.source,)
        if OBJECTIVES.find(self.name) is self:
            return as_objective, (self.name,)
        return Objective, (self.name, self.function, self.direction, self.unit, self.source)

    def __post_init__(self) -> None:
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"direction={self.direction!r}; it must be 'minimize' or 'maximize'")

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __call__(self, measurement: Measurement) -> float:
        """The objective's value.

        Raises:
            ObjectiveError: If the function raises, or returns something that is not a finite number; the message
                names the measurements that were absent, which is the usual reason.
        """
        try:
            value: Any = self.function(measurement)
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
            raise ObjectiveError(f"the objective {self.name!r} {problem}{_absent(measurement)}") from error
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        problem = f"returned {value!r}; it must return a finite number"
        raise ObjectiveError(f"the objective {self.name!r} {problem}{_absent(measurement)}")


def _absent(measurement: Measurement) -> str:
    names = [name for name, value in vars(measurement).items() if value is None or value == ()]
    return f" (not measured here: {', '.join(names)})" if names else ""


OBJECTIVES: Registry[Objective] = Registry("objective")


def objective(direction: Direction = "minimize", unit: str = "") -> Callable[[Function], Objective]:
    """Registers a function of a `Measurement` as an objective, under its own name. A decorator.

    Args:
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The unit of what the function returns.
    """

    def register(function: Function) -> Objective:
        made = Objective(function.__name__, function, direction, unit)
        OBJECTIVES.add(made.name, made, definition=function)
        return made

    return register


def as_objective(given: str | Objective | Function) -> Objective:
    """An objective from its name, ``file.py:name``, or a plain function (which is minimized).

    Raises:
        ValueError: If the name is unknown, or the file does not hold a usable function.
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        is_file = ":" in given or given.endswith(".py")
        return _from_file(given) if is_file else OBJECTIVES.get(given)
    if callable(given):
        name = getattr(given, "__name__", "")
        return Objective(name if name.isidentifier() else "objective", given)  # a lambda's is <lambda>
    raise ValueError(f"objective={given!r}; give a name, file.py:name or a function of a Measurement")


def _from_file(spec: str) -> Objective:
    found = load_from_file(spec)
    if not callable(found):
        raise ValueError(f"{spec!r} is a {type(found).__name__}, not a function of a Measurement")
    return replace(as_objective(found), source=spec)
