"""The result of a study."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from autocompress.verdict.decision_threshold import DecisionThreshold
from autocompress.verdict.per_class import PerClass

if TYPE_CHECKING:
    import pandas as pd

GRID = 64  # densities at which the posterior of the drop is stored


@dataclass(frozen=True)
class Tested:
    """A trial of the shortlist, which is judged on test, densest first, up to the first that is not certified.

    Attributes:
        number: The trial's number.
        density: Its density.
        drop_val: Its drop on val, a fraction.
        outcome: The verdict on it alone; None if it was not judged.
        drop: Its drop on test, a fraction; None if it was not judged.
        upper: The upper bound on that drop, with the study's confidence.
    """

    number: int
    density: float
    drop_val: float
    outcome: Outcome | None = None
    drop: float | None = None
    upper: float | None = None


@dataclass(frozen=True)
class Result:
    """The result of a study.

    Attributes:
        name: The study's name.
        verdict: ``"certified"``, ``"not certifiable"`` or ``"not met"``, see `autocompress.certify`.
        sentence: The verdict in words.
        certificate: The verdict on the drop on test, with its bounds; None if no trial was feasible on val.
        model: The compressed model as it is deployed, BatchNorm folded, in eval mode on the CPU; the dense model
            if no trial met the bound. `autocompress.load` gives it as it was trained.
        density: The model's density.
        drop_val: The model's drop on val, a fraction.
        measurements: The measurements of ``"dense"`` and, if a trial met the bound, ``"compressed"``.
        scores: The metric by model and split, such as ``scores["dense"]["val"]``.
        records: All finished trials, in the order in which they finished.
        threshold: The 80% interval of the lowest feasible density; None if the scheme takes no density.
        stopped: The reason why the search ended, in words.
        seconds: Wall time of the study, in seconds; for a resumed one since it was resumed.
        exported: The files of the answer, and the formats that could not be exported.
        folder: The study's folder.
        per_class: Recall, precision and confusion on test, dense and compressed; None without an answer.
        constraints: For each constraint, its check on val and its verdict on test.
        answer: The number of the trial that is the study's answer; None if no trial was feasible.
        belief: The posterior of the drop; None if the scheme takes no density.
        layers: The size of each layer before and after compression.
        failures: Number and reason of each trial that ended without a result.
        shortlist: The trials judged on test, in that order: up to two denser ones, and the search's answer.
        objectives: The objectives, if there are several; else empty.
        resumed_with: Number of trials that had finished before the study was resumed.
        front: With several objectives, the numbers of the Pareto-optimal trials among those feasible on val,
            ordered by the first objective.
        notes: The notes given before the first trial: how the data were divided, constraints that the dense model
            misses, layers that cannot be compressed. And those on the answer: constraints that it meets at the
            cost of another class.
        dense_constraints: For each constraint, the dense model's score by split, such as
            ``dense_constraints[0]["val"]``; None for a bound on a cost.
        decision_thresholds: With a metric or a constraint at an operating point, the decision thresholds of
            ``"dense"`` and ``"compressed"``, by class.
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
    notes: tuple[str, ...] = ()
    dense_constraints: tuple[Mapping[str, float] | None, ...] = ()
    decision_thresholds: Mapping[str, Sequence[DecisionThreshold]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line, because the trials and the posterior hold thousands of numbers."""
        summary = f"{self.verdict}, density {self.density:.4g}, {len(self.records)} trials"
        return f"<Result {self.name!r}: {summary}, in {self.folder}>"

    @property
    def met(self) -> bool:
        """Whether a compressed model meets the bound, certified or not."""
        return self.verdict != "not met"

    @property
    def interrupted(self) -> bool:
        """Whether the search was stopped by Ctrl-C."""
        return self.stopped == INTERRUPTED

    @property
    def trials(self) -> "pd.DataFrame":
        """A table with one row per trial."""
        import pandas as pd

        return pd.DataFrame([trial_row(record) for record in self.records])

    def to_json(self) -> dict[str, Any]:
        """The result as JSON types: what ``--json`` prints and ``result.json`` holds."""
        pairs = self.measurements
        result = {
            "name": self.name,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "notes": list(self.notes),
            "density": self.density,
            "drop_pp": {
                "val": 100 * self.drop_val,
                "test": 100 * self.certificate.drop if self.certificate else None,
                "upper": 100 * self.certificate.upper if self.certificate else None,
            },
            "scores": self.scores,
            "constraints": [
                {"constraint": val.text, "dense": dense, "val": asdict(val), "test": asdict(test)}
                for dense, (val, test) in zip(self.dense_constraints, self.constraints, strict=True)
            ],
            "decision_thresholds": {
                who: [asdict(threshold) for threshold in thresholds]
                for who, thresholds in self.decision_thresholds.items()
            },
            **(self.per_class.to_json() if self.per_class else {"classes": None, "confusion": None}),
            **{
                name: {who: getattr(m, name) for who, m in pairs.items()}
                for name in ("params", "size_bytes", "macs")
            },
            "latency_ms": {who: {str(at.batch): asdict(at) for at in m.own_latency} for who, m in pairs.items()},
            "measurements": {who: asdict(m) for who, m in pairs.items()},
            "certificate": asdict(self.certificate) if self.certificate else None,
            "objectives": [
                {"name": objective.name, "direction": objective.direction, "unit": objective.unit}
                for objective in self.objectives
            ],
            "front": [
                self._front_row(record) for n in self.front for record in self.records if record.number == n
            ],
            "shortlist": [asdict(tested) for tested in self.shortlist],
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

    def _front_row(self, record: TrialResult) -> dict[str, Any]:
        names = [objective.name for objective in self.objectives]
        return {
            "number": record.number,
            **{name: getattr(record, name) for name in ("density", "score")},
            "drop_pp": 100 * record.drop,
            "values": dict(zip(names, record.values, strict=True)),
        }

    def _posterior(self) -> dict[str, Any] | None:
        """The posterior of the drop on a grid of densities, in points, and that the answer is feasible."""
        if self.belief is None:
            return None
        densities = np.geomspace(self.belief.low, 1.0, GRID)
        curves = zip(("drop_pp", "low_pp", "high_pp"), self.belief.curve(densities, mass=0.8), strict=True)
        density = next((record.density_asked for record in self.records if record.number == self.answer), None)
        return {
            "mass": 0.8,
            "density": densities.tolist(),
            **{name: (100 * drop).tolist() for name, drop in curves},
            "p_feasible": self.belief.p_feasible(density) if density is not None else None,
        }


def _finite(value: Any) -> Any:
    """The value with None for infinities and NaN, wherever in it: JSON has no words for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trial_row(result: TrialResult) -> dict[str, Any]:
    """A trial as a flat row of a table, by column."""
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
        **{checked.text: checked.value for checked in result.constraints},
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
