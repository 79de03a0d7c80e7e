"""Objective: what the search makes as small (or large) as it can within the accuracy bound."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from autocompress.measure import Measurement
from autocompress.plugins import Registry, load_from_file

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Objective:
    """A number to optimize, computed from a `Measurement`.

    Attributes:
        name: As it appears in tables and logs.
        function: Maps a measurement to the number.
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The number's unit, for tables; empty when it has none.
    """

    name: str
    function: Callable[[Measurement], float]
    direction: Direction = "minimize"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"direction={self.direction!r}; it must be 'minimize' or 'maximize'")
        self.__dict__["__module__"] = getattr(self.function, "__module__", None)

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def __call__(self, measurement: Measurement) -> float:
        """The objective's value.

        Raises:
            ValueError: If the function raises, or returns something that is not a finite number; the message
                names the measurements that were absent, which is the usual reason.
        """
        try:
            value: Any = self.function(measurement)
        except Exception as error:
            raise ValueError(
                f"the objective {self.name!r} raised {type(error).__name__}: {error}{_absent(measurement)}"
            ) from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"the objective {self.name!r} returned {value!r}; it must return a finite number"
                f"{_absent(measurement)}"
            )
        return float(value)


def _absent(measurement: Measurement) -> str:
    names = [name for name, value in vars(measurement).items() if value is None]
    return f" (not measured here: {', '.join(names)})" if names else ""


OBJECTIVES: Registry[Objective] = Registry("objective")


def objective(
    direction: Direction = "minimize", unit: str = ""
) -> Callable[[Callable[[Measurement], float]], Objective]:
    """Registers a function of a `Measurement` as an objective, under its own name. A decorator.

    Args:
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The unit of what the function returns.
    """

    def register(function: Callable[[Measurement], float]) -> Objective:
        made = Objective(function.__name__, function, direction, unit)
        OBJECTIVES.add(made.name, made)
        return made

    return register


def as_objective(given: "str | Objective | Callable[[Measurement], float]") -> Objective:
    """An objective from its name, ``file.py:name``, or a plain function (which is minimized).

    Raises:
        ValueError: If the name is unknown, or the file does not hold a usable function.
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        if ".py:" not in given and not given.endswith(".py"):
            return OBJECTIVES.get(given)
        if given.endswith(".py"):
            raise ValueError(f"{given!r}: say which function of the file, as in {given}:name")
        found = load_from_file(given)
        if not callable(found):
            raise ValueError(f"{given!r} is a {type(found).__name__}, not a function of a Measurement")
        return as_objective(found)
    if callable(given):
        return Objective(getattr(given, "__name__", "objective"), given)
    raise ValueError(f"objective={given!r}; give a name, file.py:name or a function of a Measurement")
