"""Limit: what the compressed model may cost, such as ``latency<=5ms``; and all that ``--constraint`` takes."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from autocompress.arguments import instance, listing
from autocompress.goal import OBJECTIVES, Combination, Objective, ObjectiveError, as_objective
from autocompress.measurement import Measurement
from autocompress.metrics import METRICS
from autocompress.plugins import is_in_file, load_from_file
from autocompress.task import Evaluation
from autocompress.verdict.constraint import WRITTEN, Checked, Constraint, Judged, Standing, parse_constraint

# The units in which a limit may be written, by the unit of the objective, each as a multiple of that.
UNITS = {
    "ms": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "bytes": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "mJ": {"uJ": 1e-3, "µJ": 1e-3, "mJ": 1.0, "J": 1e3},
}
COUNTS = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}  # for all other units
SMALLEST = 1e-12  # stands for a cost of 0, which has no logarithm
TIMED_CONFIDENCE = 0.95  # of the interval of a timed value, which its measurement has, see `Measurement.noise`


@dataclass(frozen=True)
class Limit:
    """An objective, and the worst value that it may have.

    Attributes:
        objective: The objective that is measured on the compressed model.
        value: The largest value allowed, or the smallest if it is maximized; in the objective's unit.
        written: The value as the user wrote it: ``"5ms"``.
    """

    objective: Objective
    value: float
    written: str

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise ValueError(f"{self.text}: the value must be a positive number")

    @property
    def text(self) -> str:
        """The limit as it is written: ``"latency<=5ms"``."""
        operator = "<=" if self.objective.direction == "minimize" else ">="
        return f"{self.objective.source or self.objective.name}{operator}{self.written}"

    def excess(self, cost: float) -> float:
        """The logarithm of the ratio of ``cost`` to the allowed value; at most 0 where it is within the limit."""
        sign = 1 if self.objective.direction == "minimize" else -1
        return round(sign * math.log(max(cost, SMALLEST) / self.value), 12)

    def check(self, cost: Measurement, dense: Measurement | None = None) -> Checked:
        """Checks the limit on the measurement of a trial's model.

        Args:
            cost: The model's measurement.
            dense: The dense model's, for objectives that are relative to it.

        Raises:
            ValueError: If the objective needs something that was not measured.
        """
        value = self._value(cost, dense)
        return Checked(self.text, value, 0.0, self.excess(value), unit=self.objective.unit, is_cost=True)

    def judge(self, cost: Measurement, dense: Measurement | None = None) -> Judged:
        """Judges the limit on the answer's measurement; a timed value has bounds of `TIMED_CONFIDENCE`."""
        value = self._value(cost, dense)
        noise = cost.noise if self._is_timed(cost, dense) else 0.0
        lower, upper = value * (1 - noise), value * (1 + noise)
        worse, better = (upper, lower) if self.objective.direction == "minimize" else (lower, upper)
        standing: Standing = "not certifiable"
        if self.excess(worse) <= 0:
            standing = "certified"
        elif self.excess(better) > 0:
            standing = "not met"
        met, unit = self.excess(value) <= 0, self.objective.unit
        return Judged(self.text, value, lower, upper, TIMED_CONFIDENCE, standing, met, unit=unit, is_cost=True)

    def _value(self, cost: Measurement, dense: Measurement | None) -> float:
        try:
            return self.objective(cost, dense)
        except ObjectiveError as error:
            raise ValueError(f"{self.text}: {error}") from error

    def _is_timed(self, cost: Measurement, dense: Measurement | None) -> bool:
        """Whether the objective needs latencies."""
        try:
            self.objective(replace(cost, latency=()), dense)
        except ObjectiveError:
            return True
        return False


Requirement: TypeAlias = Constraint | Limit
REQUIREMENT = instance(
    "a text such as 'sensitivity>=0.95' or 'size<=1MB', or a Constraint or a Limit", str, Constraint, Limit
)


def check_all(
    required: Sequence[Requirement], evaluation: Evaluation, cost: Measurement, dense: Measurement | None = None
) -> tuple[Checked, ...]:
    """Checks all requirements on a trial: constraints on its evaluation on val, limits on its measurement."""
    return tuple(
        one.check(evaluation) if isinstance(one, Constraint) else one.check(cost, dense) for one in required
    )


def parse_constraints(
    given: str | Requirement | Sequence[str | Requirement], classes: Sequence[str] = ()
) -> tuple[Requirement, ...]:
    """The requirements that are given, on metrics or on anything that can be an objective.

    Args:
        given: Texts such as ``"sensitivity>=0.95"``, ``"latency<=5ms"`` or ``"costs.py:footprint<=3k"``, or
            requirements.
        classes: The names of the classes, for a metric of one of them.

    Raises:
        ValueError: If a text is not of this form, its name is unknown, or a requirement is given twice.
    """
    parsed = tuple(_parsed(one, classes) if isinstance(one, str) else one for one in listing(given))
    texts = [one.text for one in parsed]
    if len(set(texts)) < len(texts):
        raise ValueError(f"the constraints {', '.join(texts)} name one twice; give each once")
    return parsed


def _parsed(text: str, classes: Sequence[str]) -> Requirement:
    match = re.fullmatch(WRITTEN, text)
    if match is None:
        return parse_constraint(text, classes)  # raises an error that shows the form
    name, operator, number, unit = match.groups()
    objective = _objective(name)
    if objective is None:
        return parse_constraint(text, classes)
    if operator != ("<=" if objective.direction == "minimize" else ">="):
        right = "<=" if operator == ">=" else ">="
        raise ValueError(f"{text!r} would rule out what is better; write {name}{right}{number}{unit}")
    factors = {"": 1.0} | UNITS.get(objective.unit, COUNTS if objective.unit else COUNTS | {"%": 0.01})
    if unit not in factors:
        known = ", ".join(filter(None, factors))
        raise ValueError(f"{text!r}: {unit!r} is no unit of {name} ({known}, or none for {objective.unit or '1'})")
    return Limit(objective, float(number) * factors[unit], f"{number}{unit}")


def _objective(name: str) -> Objective | None:
    """The objective of a name; None if it is the name of a metric.

    A function in a file is an objective if it takes one argument, or was registered as one.

    Raises:
        ValueError: If the name is neither an objective nor a metric.
    """
    if name in METRICS or re.fullmatch(r"\w+(\[.+\]|(\[.+\])?\s*@(?!.*\.py).*)", name):
        return None
    if "(" in name and not is_in_file(name):
        return as_objective(name)
    if ":" in name or name.endswith(".py"):
        loaded = load_from_file(name)
        plain = Objective(name, loaded) if callable(loaded) and not isinstance(loaded, Objective) else loaded
        takes_one = isinstance(plain, Objective) and (plain is loaded or plain.arguments == 1)
        return as_objective(name) if takes_one else None
    if isinstance(objective := OBJECTIVES.find(name), Objective):
        return objective
    if isinstance(objective, Combination):
        return objective.of()  # raises an error that says what it needs
    known = [*METRICS, *(other for other, _ in OBJECTIVES)]
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    available = f"available: {', '.join(known)}, recall[CLASS], specificity@sensitivity=0.95, or file.py:name"
    raise ValueError(f"unknown metric or objective {name!r}{hint} ({available})")
