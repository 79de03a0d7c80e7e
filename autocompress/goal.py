"""Objective: the number that the search minimizes or maximizes within the accuracy bound."""

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
# How to get measurements that are absent, by the first part of the field's name.
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
        function: Maps a measurement to the number, or to None if a field that it needs is absent. A function of
            two arguments also gets the dense model's measurement, taken in turns with the first.
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The number's unit, for tables; empty when it has none.
        source: ``file.py:name`` as the user wrote it, if it comes from a file; of a combination its spec, such as
            ``weighted_sum(density=1)``.
        whole: ``file.py:name`` with the file's absolute path, which finds it again in any folder.
    """

    name: str
    function: Function
    direction: Direction = "minimize"
    unit: str = ""
    source: str = ""
    whole: str = ""

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickles by file or registered name: in its module, `objective` has replaced the function."""
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
        """Number of arguments that the function requires."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError:  # a builtin
            return 1
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return len([p for p in parameters if p.kind in positional and p.default is p.empty])

    def __call__(self, measurement: Measurement, dense: Measurement | None = None) -> float:
        """The objective's value.

        Args:
            measurement: The measurement of the model to judge.
            dense: The dense model's measurement; by default ``measurement`` is taken for it.

        Raises:
            ObjectiveError: If the function raises, or returns something that is not a finite number; the message
                names the absent measurements that it reads, which is the usual reason.
        """
        try:
            value = self._call(measurement, dense or measurement)
        except ObjectiveError:
            raise
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
            raise ObjectiveError(f"the objective {self.name!r} {problem}{self._absent(measurement)}") from error
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        problem = f"returned {value!r}; it must return a finite number"
        raise ObjectiveError(f"the objective {self.name!r} {problem}{self._absent(measurement)}")

    def _call(self, measurement: Any, dense: Any) -> Any:
        function: Callable[..., Any] = self.function
        return function(measurement, dense) if self.is_relative else function(measurement)

    def _absent(self, measurement: Measurement) -> str:
        """Names the absent measurements that the function reads and how to get them; empty if there are none."""
        watched = _Watched(measurement)
        with contextlib.suppress(Exception):  # reported by the caller
            self._call(watched, watched)
        if not watched.absent:
            return ""
        remedies = [REMEDIES[key] for name in watched.absent for key in REMEDIES if name.startswith(key)]
        if reason := measurement.not_run.get(measurement.runtime):
            remedies.append(reason)
        return f" (not measured here: {'; '.join([', '.join(watched.absent), *dict.fromkeys(remedies)])})"


class _Watched:
    """A measurement that records which of its absent fields are read."""

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
        weight: Its weight, greater than 0.
        relative: Its value over the dense model's, or the inverse if it is maximized: the dense model has 1, and
            less is better.
    """

    weight: float
    relative: float


@dataclass(frozen=True)
class Combination:
    """A way to combine several objectives into one, as in ``weighted_sum(density=0.3, latency=0.7)``.

    Attributes:
        name: The name that users write.
        function: Maps the terms to the number that is minimized.
    """

    name: str
    function: Callable[[Sequence[Term]], float]
    direction: Direction = "minimize"
    unit: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by registered name: in its module, `combination` has replaced the function."""
        return _registered, (self.name,)

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def of(self, **weights: float) -> Objective:
        """Combines the objectives of the given names, with the given weights, into one.

        Raises:
            ValueError: If no name is given, a name is unknown, or a weight is not a positive number.
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
    """The registered objective of that name; ValueError if it is a combination."""
    registered = _registered(name)
    if isinstance(registered, Combination):
        raise ValueError(f"{name!r} is a combination itself; combine plain objectives")
    return registered


def _ratio(objective: Objective, value: float, dense: float) -> float:
    """`Term.relative`."""
    over, under = (value, dense) if objective.direction == "minimize" else (dense, value)
    if under == 0:
        raise ObjectiveError(f"the objective {objective.name!r} is 0, and nothing can be relative to it")
    return over / under


OBJECTIVES: Registry[Objective | Combination] = Registry("objective")


def objective(direction: Direction = "minimize", unit: str = "") -> Callable[[Function], Objective]:
    """Registers a function of a `Measurement` as an objective, under its own name. A decorator.

    Args:
        direction: ``"minimize"`` or ``"maximize"``.
        unit: The unit of the function's result, for tables.
    """

    def register(function: Function) -> Objective:
        registered = Objective(function.__name__, function, direction, unit)
        OBJECTIVES.add(registered.name, registered, definition=function)
        return registered

    return register


def combination(function: Callable[[Sequence[Term]], float]) -> Combination:
    """Registers a function of `Term`s, which combines several objectives into one. A decorator."""
    registered = Combination(function.__name__, function)
    OBJECTIVES.add(registered.name, registered, definition=function)
    return registered


def as_objective(given: str | Objective | Function) -> Objective:
    """An objective from its name, a combination of names, ``file.py:name``, or a function (which is minimized).

    Raises:
        ValueError: If a name is unknown, or the file does not define a usable function.
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str):
        if "(" in given and not is_in_file(given):
            return _from_call(given)
        if ":" in given or given.endswith(".py"):
            return _from_file(given)
        registered = OBJECTIVES.get(given)
        return registered.of() if isinstance(registered, Combination) else registered
    if callable(given) and not isinstance(given, Combination):
        name = getattr(given, "__name__", "")
        return Objective(name if name.isidentifier() else "objective", given)  # a lambda's is <lambda>
    raise ValueError(f"objective={given!r}; give a name, file.py:name or a function of a Measurement")


def _from_call(spec: str) -> Objective:
    """Parses a combination, ``name(other=weight, another)``; weights that are left out are 1."""
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
    registered = OBJECTIVES.get(call.func.id)
    if isinstance(registered, Objective):
        raise ValueError(f"{spec!r}: {registered.name} is an objective by itself and takes no others")
    return registered.of(**weights)


def _from_file(spec: str) -> Objective:
    found = load_from_file(spec)
    if not callable(found):
        raise ValueError(f"{spec!r} is a {type(found).__name__}, not a function of a Measurement")
    return replace(as_objective(found), source=written_spec(whole_spec(spec)), whole=whole_spec(spec))
