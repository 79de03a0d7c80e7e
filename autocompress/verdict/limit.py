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

# What a number may be written in, by the unit of the objective, and how many of that unit it is.
UNITS = {
    "ms": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "bytes": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "mJ": {"uJ": 1e-3, "µJ": 1e-3, "mJ": 1.0, "J": 1e3},
}
COUNTS = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}  # of any other
SMALLEST = 1e-12  # a cost of 0 has no logarithm


@dataclass(frozen=True)
class Limit:
    """An objective, and what its value must not be worse than.

    Attributes:
        objective: What is measured of the compressed model.
        value: The most that it may be, or the least of one that is maximized; in the objective's unit.
        written: The value as it was written: ``"5ms"``.
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
        """The logarithm of how many times ``cost`` is what is allowed; at most 0 where it is within."""
        sign = 1 if self.objective.direction == "minimize" else -1
        return round(sign * math.log(max(cost, SMALLEST) / self.value), 12)

    def check(self, cost: Measurement, dense: Measurement | None = None) -> Checked:
        """What the measurement of a trial's model makes of it.

        Raises:
            ValueError: If it cannot be told from what was measured.
        """
        value = self._value(cost, dense)
        return Checked(self.text, value, 0.0, self.excess(value), unit=self.objective.unit, is_cost=True)

    def judge(self, cost: Measurement, dense: Measurement | None = None, confidence: float = 0.95) -> Judged:
        """The same of the answer; a value that was timed is known to its confidence interval."""
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
        return Judged(self.text, value, lower, upper, confidence, standing, met, unit=unit, is_cost=True)

    def _value(self, cost: Measurement, dense: Measurement | None) -> float:
        try:
            return self.objective(cost, dense)
        except ObjectiveError as error:
            raise ValueError(f"{self.text}: {error}") from error

    def _is_timed(self, cost: Measurement, dense: Measurement | None) -> bool:
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
    """What a trial makes of each: its evaluation on val of a metric's, what it costs of the others."""
    return tuple(
        one.check(evaluation) if isinstance(one, Constraint) else one.check(cost, dense) for one in required
    )


def parse_constraints(
    given: str | Requirement | Sequence[str | Requirement], classes: Sequence[str] = ()
) -> tuple[Requirement, ...]:
    """All of them, each once: of a metric, or of anything that can be an objective.

    Args:
        given: Such as ``"sensitivity>=0.95"``, ``"latency<=5ms"`` or ``"costs.py:footprint<=3k"``.
        classes: The names of the classes, for a metric of one of them.

    Raises:
        ValueError: If one is not written so, nothing has its name, or one is given twice.
    """
    parsed = tuple(_parsed(one, classes) if isinstance(one, str) else one for one in listing(given))
    texts = [one.text for one in parsed]
    if len(set(texts)) < len(texts):
        raise ValueError(f"the constraints {', '.join(texts)} name one twice; give each once")
    return parsed


def _parsed(text: str, classes: Sequence[str]) -> Requirement:
    match = re.fullmatch(WRITTEN, text)
    if match is None:
        return parse_constraint(text, classes)  # says how it is written
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
    """The objective of that name; None where it names a metric.

    A function in a file is an objective if it takes one argument, or was made one.

    Raises:
        ValueError: If it is neither.
    """
    if name in METRICS or re.fullmatch(r"\w+\[.+\]", name):
        return None
    if "(" in name and not is_in_file(name):
        return as_objective(name)
    if ":" in name or name.endswith(".py"):
        found = load_from_file(name)
        plain = Objective(name, found) if callable(found) and not isinstance(found, Objective) else found
        takes_one = isinstance(plain, Objective) and (plain is found or plain.arguments == 1)
        return as_objective(name) if takes_one else None
    if isinstance(objective := OBJECTIVES.find(name), Objective):
        return objective
    if isinstance(objective, Combination):
        return objective.of()  # which says what it needs
    known = [*METRICS, *(other for other, _ in OBJECTIVES)]
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    available = f"available: {', '.join(known)}, recall[CLASS], or file.py:name"
    raise ValueError(f"unknown metric or objective {name!r}{hint} ({available})")
