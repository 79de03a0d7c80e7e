"""What a study found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from autocompress.certify import Outcome, Verdict
from autocompress.export import Export
from autocompress.goal import Objective
from autocompress.measurement import Measurement
from autocompress.networks.layers import Layer
from autocompress.search import INTERRUPTED
from autocompress.searching.posterior import Posterior
from autocompress.trial import TrialResult
from autocompress.verdict.constraint import Checked, Judged
from autocompress.verdict.per_class import PerClass

if TYPE_CHECKING:
    import pandas as pd

GRID = 64  # points at which the believed drop is written down


@dataclass(frozen=True)
class Tested:
    """One of the shortlist that is judged on test, densest first.

    Attributes:
        number: The trial's number.
        density: Its density.
        drop_val: What it loses on val, a fraction.
        outcome: The verdict on it alone; None where a denser one had failed before its turn.
        drop: What it loses on test, a fraction.
        upper: What that is at most, with the study's confidence.
    """

    number: int
    density: float
    drop_val: float
    outcome: Outcome | None = None
    drop: float | None = None
    upper: float | None = None


@dataclass(frozen=True)
class Result:
    """What a study found.

    Attributes:
        name: The study's name.
        verdict: ``"certified"``, ``"not certifiable"`` or ``"not met"``, see `autocompress.certify`.
        sentence: The verdict in one sentence.
        certificate: The numbers behind it, on test; None when no trial was feasible on val.
        model: The compressed model as it is deployed, BatchNorm folded, in eval mode on the CPU; the dense one
            when nothing met the bound. `autocompress.load` gives it as it was trained.
        density: Its density.
        drop_val: What it loses on val, as a fraction.
        measurements: ``"dense"`` and ``"compressed"`` side by side.
        scores: The metric by model and split, such as ``scores["dense"]["val"]``.
        records: All trials, in the order in which they finished.
        threshold: The 80% interval of the lowest feasible density, where the scheme has one.
        stopped: Why the search ended, in words.
        seconds: Wall time of the study; of one that was resumed, since then.
        exported: The files of the answer and what could not be exported.
        folder: Where everything lies.
        per_class: Recall, precision and confusion on test, before and after; None without an answer.
        constraints: What came of each constraint on val and on test.
        answer: The number of the trial that the search answers with; None when no trial was feasible.
        belief: What the search believes of the drop, where the scheme has a density.
        layers: What compression left of each layer.
        failures: The trials that ended without a result: number and reason.
        shortlist: What was judged on test, in that order: up to two denser trials, and the search's answer.
        objectives: What was optimized, where there were several.
        resumed_with: How many of the trials were there when the study was resumed.
        front: With several objectives the trials that were feasible on val and that no other such beats in one
            without being beaten in another, by the first objective.
    """

    name: str
    verdict: Literal["certified", "not certifiable", "not met"]
    sentence: str
    certificate: Verdict | None
    model: nn.Module
    density: float
    drop_val: float
    measurements: Mapping[str, Measurement]
    scores: Mapping[str, Mapping[str, float]]
    records: Sequence[TrialResult]
    threshold: tuple[float, float] | None
    stopped: str
    seconds: float
    exported: Export
    folder: Path
    per_class: PerClass | None = None
    constraints: tuple[tuple[Checked, Judged], ...] = ()
    answer: int | None = None
    belief: Posterior | None = None
    layers: tuple[Layer, ...] = ()
    failures: tuple[tuple[int, str], ...] = ()
    shortlist: tuple[Tested, ...] = ()
    objectives: tuple[Objective, ...] = ()
    resumed_with: int = 0
    front: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """In a line: the trials and the belief hold thousands of numbers."""
        found = f"{self.verdict}, density {self.density:.4g}, {len(self.records)} trials"
        return f"<Result {self.name!r}: {found}, in {self.folder}>"

    @property
    def met(self) -> bool:
        """Whether a compressed model meets the bound, as far as the data can tell."""
        return self.verdict != "not met"

    @property
    def interrupted(self) -> bool:
        """Whether the search was stopped by Ctrl-C."""
        return self.stopped == INTERRUPTED

    @property
    def trials(self) -> "pd.DataFrame":
        """One row a trial."""
        import pandas as pd

        return pd.DataFrame([trial_row(record) for record in self.records])

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types: what ``--json`` prints and ``result.json`` holds."""
        pairs = self.measurements
        result = {
            "name": self.name,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "density": self.density,
            "drop_pp": {
                "val": 100 * self.drop_val,
                "test": 100 * self.certificate.drop if self.certificate else None,
                "upper": 100 * self.certificate.upper if self.certificate else None,
            },
            "scores": self.scores,
            "constraints": [
                {"constraint": val.text, "val": asdict(val), "test": asdict(test)}
                for val, test in self.constraints
            ],
            **(self.per_class.to_json() if self.per_class else {"classes": None, "confusion": None}),
            **{
                name: {who: getattr(m, name) for who, m in pairs.items()}
                for name in ("params", "size_bytes", "macs")
            },
            "latency_ms": {who: {str(at.batch): asdict(at) for at in m.own_latency} for who, m in pairs.items()},
            "measurements": {who: asdict(m) for who, m in pairs.items()},
            "certificate": asdict(self.certificate) if self.certificate else None,
            "objectives": [
                {"name": one.name, "direction": one.direction, "unit": one.unit} for one in self.objectives
            ],
            "front": [self._of_front(record) for n in self.front for record in self.records if record.number == n],
            "shortlist": [asdict(one) for one in self.shortlist],
            "threshold": self.threshold,
            "posterior": self._posterior(),
            "stopped": self.stopped,
            "seconds": self.seconds,
            "resumed_with": self.resumed_with,
            "answer": self.answer,
            "chosen": next((dict(record.params) for record in self.records if record.number == self.answer), {}),
            "trials": [trial_row(record) for record in self.records],
            "failed": [{"number": number, "reason": reason} for number, reason in self.failures],
            "layers": [asdict(layer) for layer in self.layers],
            "artifacts": {a.format: str(a.path) for a in self.exported.artifacts},
            "not_exported": dict(self.exported.refused),
            "folder": str(self.folder),
        }
        return {key: _finite(value) for key, value in result.items()}

    def _of_front(self, record: TrialResult) -> dict[str, Any]:
        names = [one.name for one in self.objectives]
        return {
            "number": record.number,
            **{name: getattr(record, name) for name in ("density", "score")},
            "drop_pp": 100 * record.drop,
            "values": dict(zip(names, record.values, strict=True)),
        }

    def _posterior(self) -> dict[str, Any] | None:
        """The believed drop on a grid of densities, in points, and the probability that the answer is feasible."""
        if self.belief is None:
            return None
        densities = np.geomspace(self.belief.low, 1.0, GRID)
        curves = zip(("drop_pp", "low_pp", "high_pp"), self.belief.curve(densities, mass=0.8), strict=True)
        chosen = next((record.density_asked for record in self.records if record.number == self.answer), None)
        return {
            "mass": 0.8,
            "density": densities.tolist(),
            **{name: (100 * drop).tolist() for name, drop in curves},
            "p_feasible": self.belief.p_feasible(chosen) if chosen is not None else None,
        }


def _finite(value: Any) -> Any:
    """The same with None for the numbers that JSON has no word for: a bound may be infinite."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trial_row(result: TrialResult) -> dict[str, Any]:
    """A trial as one flat row."""
    m = result.measurement
    return {
        "number": result.number,
        **result.params,
        "density_asked": result.density_asked,
        "density": result.density,
        "score": result.score,
        "drop_pp": 100 * result.drop,
        "feasible": result.feasible,
        "rejected": result.rejected,
        **{one.text: one.value for one in result.constraints},
        "value": result.value,
        **{f"value_{i}": value for i, value in enumerate(result.values[1:], start=2)},
        "params": m.params,
        "size_bytes": m.size_bytes,
        "macs": m.macs,
        "latency_ms": m.latency_ms,
        "recovery": result.recovery,
        "steps": result.steps,
        "start": result.start,
        "seconds": result.seconds,
    }
