"""What is asked of a study, what it reports as it goes, and what it found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch import nn

from autocompress.certify import CONFIDENCE, Outcome, Verdict, check_confidence
from autocompress.constraint import Checked, Judged
from autocompress.dimensions import Dimension
from autocompress.export import Export
from autocompress.goal import Objective
from autocompress.layers import Layer
from autocompress.lc import LearningCompression
from autocompress.limit import Requirement
from autocompress.measurement import Measurement
from autocompress.per_class import PerClass
from autocompress.posterior import Posterior
from autocompress.recovery import Recovery, settings_of
from autocompress.scheme import AUTO, Scheme, describe
from autocompress.search import INTERRUPTED, TOLERANCE
from autocompress.task import Task
from autocompress.trial import Bound, TrialResult

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_TRIALS = 8
GRID = 64  # points at which the believed drop is written down


@dataclass(frozen=True)
class Settings:
    """What is asked of a study.

    Attributes:
        schemes: How to compress; several when the search chooses among them.
        bound: What may be lost.
        objective: What to optimize within the bound.
        others: Further objectives; then the search seeks a front, see `autocompress.selection`.
        sampler: What to try next, see `autocompress.samplers.SAMPLERS`.
        recovery: How a trial compresses and trains, and its budget.
        seed: Seeds the search and the trials.
        trials: How many trials, at most.
        timeout_s: Seconds after which no further trial begins; None for no limit.
        epochs_total: Passes over the training data by all trials together after which no further one begins.
        device: Where trials run, as torch names it.
        constraints: What else the compressed model must reach, and what it may cost.
        tolerance: The search ends when the lowest feasible density is known to within this share.
        confidence: Of the bounds that the verdict states.
        workers: Trials at a time on this machine.
        cluster: The address of a Dask scheduler whose workers run the trials; None for none.
        formats: In which formats the answer is written besides the usual ones.
        cheap_trials: Whether trials start from denser ones, with fewer steps, and may be given up.
        runtime: What runs the model where objectives measure latency, see `autocompress.runtimes.RUNTIMES`.
        profile_device: Where measurements are taken, if not on ``device``.
        dimensions: What is varied beside the density and the scheme.
        is_auto: Whether the schemes are those of ``auto``: one that cannot compress the model is left out.
    """

    schemes: tuple[Scheme, ...]
    bound: Bound
    objective: Objective
    sampler: str = "threshold"
    recovery: Recovery = field(default_factory=LearningCompression)
    seed: int = 0
    trials: int = DEFAULT_TRIALS
    timeout_s: float | None = None
    epochs_total: float | None = None
    device: str = "cpu"
    constraints: tuple[Requirement, ...] = ()
    tolerance: float = TOLERANCE
    confidence: float = CONFIDENCE
    workers: int = 1
    formats: tuple[str, ...] = ()
    cheap_trials: bool = False
    cluster: str | None = None
    runtime: str = "eager"
    profile_device: str | None = None
    dimensions: tuple[Dimension, ...] = ()
    is_auto: bool = False
    others: tuple[Objective, ...] = ()

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All of them, the first one first."""
        return (self.objective, *self.others)

    @property
    def scheme(self) -> str:
        """The scheme, or the schemes that are searched, in words."""
        return AUTO if self.is_auto else ", ".join(map(describe, self.schemes))

    @property
    def search(self) -> str:
        """What is varied beside the density and the scheme, as it may be written; empty where nothing is."""
        return "; ".join(one.text for one in self.dimensions)

    @property
    def measured_on(self) -> str:
        """The device on which latency, memory and energy are measured."""
        return self.profile_device or self.device

    @property
    def unit(self) -> str:
        """What a drop times 100 is counted in: points, or percent of the dense model's score."""
        return "%" if self.bound.relative else " pp"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}; it must be at least 0")
        names = [one.name for one in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"the objectives {', '.join(names)} name one twice; give each once")
        if self.trials < 1:
            raise ValueError(f"trials={self.trials}; it must be at least 1")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"timeout={self.timeout_s}; it must be positive")
        if self.epochs_total is not None and not self.epochs_total > 0:
            raise ValueError(f"epochs_total={self.epochs_total}; it must be positive")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance={self.tolerance}; it must be positive (0.1 is a tenth of the density)")
        check_confidence(self.confidence)
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}; it must be at least 1")
        if self.workers > 1 and self.cluster:
            raise ValueError(f"workers={self.workers} are of this machine; with a cluster leave them out")
        if self.workers > 1 and ":" in self.device:
            raise ValueError(
                f"device={self.device!r} is one GPU, and workers={self.workers} take one each; name the GPUs in "
                "CUDA_VISIBLE_DEVICES and give device='cuda'"
            )

    def identity(self, task: Task) -> dict[str, Any]:
        """What makes it the same study when it is resumed: JSON types only."""
        names = [one.source or one.name for one in self.objectives]
        return {
            "task": task.name,
            "fingerprint": task.fingerprint(),
            "metric": task.metric.source or task.metric.name,
            "constraints": [constraint.text for constraint in self.constraints],
            "scheme": self.scheme,
            **({"search": self.search} if self.dimensions else {}),
            "max_drop": self.bound.max_drop,
            "drop": "relative" if self.bound.relative else "absolute",
            "objective": names[0] if len(names) == 1 else names,
            "runtime": self.runtime,
            "sampler": self.sampler,
            "seed": self.seed,
            "recovery": settings_of(self.recovery),
            "confidence": self.confidence,
            "cheap_trials": self.cheap_trials,
        }

    def budget(self) -> dict[str, Any]:
        """What may change when the study is resumed: JSON types only."""
        return {
            "trials": self.trials,
            "timeout": self.timeout_s,
            "epochs_total": self.epochs_total,
            "tolerance": self.tolerance,
            "device": self.device,
            "workers": self.workers,
            "formats": list(self.formats),
            "profile_device": self.profile_device,
        }


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
        seconds: Wall time of the study.
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
    front: tuple[int, ...] = ()

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
        **{f"value_{i}": value for i, value in enumerate(result.others, start=2)},
        "params": m.params,
        "size_bytes": m.size_bytes,
        "macs": m.macs,
        "latency_ms": m.latency_ms,
        "recovery": result.recovery,
        "steps": result.steps,
        "start": result.start,
        "seconds": result.seconds,
    }


@dataclass(frozen=True)
class Beginning:
    """What is known before the first trial, for whoever watches.

    Attributes:
        name: The study's name.
        task: What is compressed.
        settings: What is asked.
        folder: Where the study lives.
        dense: What the dense model costs; no time is taken unless the objective needs it.
        dense_score: Its score on val.
        low: The lowest density that the search may propose.
        notes: What the scheme had to leave out, and what the test data can certify.
    """

    name: str
    task: Task
    settings: Settings
    folder: Path
    dense: Measurement
    dense_score: float
    low: float
    notes: tuple[str, ...]


class Watcher(Protocol):
    """Is told how a study goes, to show it."""

    def doing(self, what: str) -> None:
        """What takes time now, in words."""

    def began(self, beginning: Beginning) -> None:
        """The dense model is known; trials begin."""

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """A trial has finished; ``best`` is what the answer would be now."""

    def failed(self, number: int, reason: str) -> None:
        """A trial ended without a result."""

    def warned(self, message: str) -> None:
        """Something was left out or went wrong without ending the study."""


class Silent:
    """A watcher that shows nothing."""

    def doing(self, what: str) -> None:
        """Nothing."""

    def began(self, beginning: Beginning) -> None:
        """Nothing."""

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """Nothing."""

    def failed(self, number: int, reason: str) -> None:
        """Nothing."""

    def warned(self, message: str) -> None:
        """Nothing."""
