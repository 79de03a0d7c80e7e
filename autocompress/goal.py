"""Objective: what the search makes as small (or large) as it can within the accuracy bound."""

import ast
import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeAlias

from autocompress.measurement import Measurement
from autocompress.plugins import Registry, is_in_file, load_from_file, whole_spec, written_spec

Direction = Literal["minimize", "maximize"]
Function: TypeAlias = Callable[[Measurement], float | None] | Callable[[Measurement, Measurement], float | None]
# What it takes to measure what a machine did not: by the beginning of a field's name.
REMEDIES = {
    "energy": "NVIDIA GPUs count energy, and processors whose RAPL counters in /sys/class/powercap you may read",
    "gpu": "they are an NVIDIA GPU's, so use --device cuda on a machine that has one",
}


class ObjectiveError(ValueError):
    """An objective gave no finite number."""


@dataclass(frozen=True)
class Objective:
    """A number to optimize, computed from a `Measurement`.

    Attributes:
        name: As it appears in tables and logs.
        function: Maps a measurement to the number, or to None when it lacks what the number is made of. With two
            arguments it gets the dense model's measurement as well, taken beside the other.
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The number's unit, for tables; empty when it has none.
        source: ``file.py:name`` where it came from a file, as it is written; of a combination what it combines.
        whole: The former with the file's whole path: what finds it again in any folder.
    """

    name: str
    function: Function
    direction: Direction = "minimize"
    unit: str = ""
    source: str = ""
    whole: str = ""

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickled by file or name where it has one: by then its function's own name is the objective's."""
        if self.source:
            return as_objective, (self.whole or self.source,)
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

    @property
    def is_relative(self) -> bool:
        """Whether the function also takes the dense model's measurement."""
        return self.arguments == 2

    @property
    def arguments(self) -> int:
        """How many arguments the function needs."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # a builtin
            return 1
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return len([p for p in parameters if p.kind in positional and p.default is p.empty])

    def __call__(self, measurement: Measurement, dense: Measurement | None = None) -> float:
        """The objective's value.

        Args:
            measurement: What the model costs.
            dense: What the dense model costs; by default ``measurement`` is the dense model's.

        Raises:
            ObjectiveError: If the function raises, or returns something that is not a finite number; the message
                names the measurements that it needs and that are absent, which is the usual reason.
        """
        try:
            value = self._of(measurement, dense or measurement)
        except ObjectiveError:
            raise
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
            raise ObjectiveError(f"the objective {self.name!r} {problem}{self._absent(measurement)}") from error
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        problem = f"returned {value!r}; it must return a finite number"
        raise ObjectiveError(f"the objective {self.name!r} {problem}{self._absent(measurement)}")

    def _of(self, *measurements: Any) -> Any:
        function: Callable[..., Any] = self.function
        return function(*measurements[: 2 if self.is_relative else 1])

    def _absent(self, measurement: Measurement) -> str:
        """Which measurements the function needs that are absent, and what it takes to have them."""
        watched = _Watched(measurement)
        with contextlib.suppress(Exception):  # what it raised before
            self._of(watched, watched)
        if not watched.absent:
            return ""
        remedies = [REMEDIES[key] for name in watched.absent for key in REMEDIES if name.startswith(key)]
        if reason := measurement.not_run.get(measurement.runtime):
            remedies.append(reason)
        return f" (not measured here: {'; '.join([', '.join(watched.absent), *dict.fromkeys(remedies)])})"


class _Watched:
    """A measurement that writes down which of its absent fields are read."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self.absent: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._measurement, name)
        if (value is None or value == ()) and name not in self.absent:
            self.absent.append(name)
        return value


@dataclass(frozen=True)
class Term:
    """One objective in a combination.

    Attributes:
        weight: How much it counts.
        relative: Its value over the dense model's; for one to be maximized the reverse. So 1 is the dense model
            and less is better.
    """

    weight: float
    relative: float


@dataclass(frozen=True)
class Combination:
    """Makes one objective of several, as in ``weighted_sum(density=0.3, latency=0.7)``.

    Attributes:
        name: What users call it.
        function: Maps the terms to the number that is minimized.
    """

    name: str
    function: Callable[[Sequence[Term]], float]
    direction: Direction = "minimize"
    unit: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name: by then its function's own name is the combination's."""
        return _registered, (self.name,)

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def of(self, **weights: float) -> Objective:
        """The objective that combines those of these names.

        Raises:
            ValueError: If there are none, one is unknown, or a weight is not positive.
        """
        if not weights:
            raise ValueError(f"{self.name} combines objectives; write {self.name}(density=0.5, latency=0.5)")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"{self.name}: the weight of {name} is {weight!r}; it must be a positive number")
        parts = {name: _plain(name) for name in weights}

        def combined(measurement: Measurement, dense: Measurement) -> float:
            values = {name: (part(measurement, dense), part(dense, dense)) for name, part in parts.items()}
            terms = [Term(weights[name], _ratio(parts[name], *pair)) for name, pair in values.items()]
            return self.function(terms)

        combined.__doc__ = self.description
        spec = f"{self.name}({', '.join(f'{name}={weight:g}' for name, weight in weights.items())})"
        return Objective(spec, combined, source=spec)


def _registered(name: str) -> "Objective | Combination":
    return OBJECTIVES.get(name)


def _plain(name: str) -> Objective:
    found = _registered(name)
    if isinstance(found, Combination):
        raise ValueError(f"{name!r} is a combination itself; combine plain objectives")
    return found


def _ratio(objective: Objective, value: float, dense: float) -> float:
    over, under = (value, dense) if objective.direction == "minimize" else (dense, value)
    if under == 0:
        raise ObjectiveError(f"the objective {objective.name!r} is 0, and nothing can be relative to it")
    return over / under


OBJECTIVES: Registry[Objective | Combination] = Registry("objective")


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


def combination(function: Callable[[Sequence[Term]], float]) -> Combination:
    """Registers a function of `Term`s, a way to make one objective of several, under its own name. A decorator."""
    made = Combination(function.__name__, function)
    OBJECTIVES.add(made.name, made, definition=function)
    return made


def as_objective(given: str | Objective | Function) -> Objective:
    """An objective from its name, a combination of names, ``file.py:name``, or a function (which is minimized).

    Raises:
        ValueError: If a name is unknown, or the file does not hold a usable function.
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        if "(" in given and not is_in_file(given):
            return _from_call(given)
        if ":" in given or given.endswith(".py"):
            return _from_file(given)
        found = OBJECTIVES.get(given)
        return found.of() if isinstance(found, Combination) else found
    if callable(given) and not isinstance(given, Combination):
        name = getattr(given, "__name__", "")
        return Objective(name if name.isidentifier() else "objective", given)  # a lambda's is <lambda>
    raise ValueError(f"objective={given!r}; give a name, file.py:name or a function of a Measurement")


def _from_call(spec: str) -> Objective:
    """The objective that ``name(other=weight, another)`` names; a weight that is not given is 1."""
    wrong = ValueError(f"{spec!r} is no objective; write a name, or weighted_sum(density=0.5, latency=0.5)")
    try:
        call = ast.parse(spec.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise wrong
        weights = {argument.id: 1.0 for argument in call.args if isinstance(argument, ast.Name)}
        weights |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError):
        raise wrong from None
    if len(weights) != len(call.args) + len(call.keywords):
        raise wrong
    found = OBJECTIVES.get(call.func.id)
    if isinstance(found, Objective):
        raise ValueError(f"{spec!r}: {found.name} is an objective by itself and takes no others")
    return found.of(**weights)


def _from_file(spec: str) -> Objective:
    found = load_from_file(spec)
    if not callable(found):
        raise ValueError(f"{spec!r} is a {type(found).__name__}, not a function of a Measurement")
    return replace(as_objective(found), source=written_spec(whole_spec(spec)), whole=whole_spec(spec))
