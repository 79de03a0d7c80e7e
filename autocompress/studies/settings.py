"""The settings of a study."""

import math
from dataclasses import dataclass, field
from typing import Any

from autocompress.certify import CONFIDENCE, check_confidence
from autocompress.goal import Objective
from autocompress.lc import LearningCompression
from autocompress.plugins import files_in, name_of
from autocompress.recovery import Recovery, Untrained, settings_of, untrained
from autocompress.scheme import AUTO, Scheme, describe
from autocompress.search import TOLERANCE
from autocompress.searching.dimensions import Dimension
from autocompress.task import Task
from autocompress.trial import Bound, can_be_cheap
from autocompress.verdict.limit import Requirement

DEFAULT_TRIALS = 8


@dataclass(frozen=True)
class Settings:
    """The settings of a study.

    Attributes:
        schemes: The schemes; the search chooses among several.
        bound: The largest allowed drop.
        objectives: The numbers to optimize within the bound; with several, the search seeks their Pareto front,
            see `autocompress.searching.selection`.
        sampler: The sampler's name, see `autocompress.searching.samplers.SAMPLERS`.
        recovery: The recovery of each trial, with its budget.
        seed: Seeds the search and the trials.
        trials: The largest number of trials.
        timeout_s: Seconds after which no further trial begins; None for no limit.
        epochs_total: Passes over the training data, by all trials together, after which no further trial begins;
            None for no limit.
        device: The device on which trials run, as torch names it.
        constraints: Further conditions on scores and costs of the compressed model.
        tolerance: The search ends when the lowest feasible density is known to this relative precision.
        confidence: Confidence of the verdict's bounds.
        workers: Number of trials that run at a time on this machine.
        cluster: The address of a Dask scheduler whose workers run the trials; None for none.
        formats: Formats of `autocompress.export.ON_REQUEST` to export in addition to the usual ones.
        cheap_trials: Whether trials start from denser ones, with fewer steps, and may be given up.
        runtime: The runtime in which objectives measure latency, see `autocompress.gauges.runtimes.RUNTIMES`.
        profile_device: The device of measurements; None for ``device``.
        dimensions: Parameters that the search varies besides the density and the scheme.
        is_auto: Whether the schemes are those of ``auto``: one that cannot compress the model is left out.
    """

    schemes: tuple[Scheme, ...]
    bound: Bound
    objectives: tuple[Objective, ...]
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

    @property
    def scheme(self) -> str:
        """The spec of the scheme or schemes, see `autocompress.scheme.parse_schemes`."""
        return AUTO if self.is_auto else ", ".join(map(describe, self.schemes))

    @property
    def search(self) -> str:
        """The spec of the dimensions, as users write it; empty if there are none."""
        return "; ".join(dimension.text for dimension in self.dimensions)

    @property
    def measured_on(self) -> str:
        """The device on which latency, memory and energy are measured."""
        return self.profile_device or self.device

    @property
    def unit(self) -> str:
        """The unit of 100 times a drop: points, or percent of the dense model's score."""
        return "%" if self.bound.relative else " pp"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}; it must be at least 0")
        names = [objective.name for objective in self.objectives]
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
        if self.epochs_total is not None and isinstance(self.recovery, Untrained):
            untrained(epochs_total=self.epochs_total)
        if self.cheap_trials and not can_be_cheap(self.recovery):
            raise ValueError(
                "cheap_trials goes with a recovery in which the density falls step by step (auto, lc or gradual), "
                f"not with {self.recovery.method!r}"
            )
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
        """The settings that must be the same when the study is resumed: JSON types only."""
        names = self._objective_names
        return {
            "task": task.name,
            "fingerprint": task.fingerprint(),
            "metric": name_of(task.metric),
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

    def files(self, task: Task) -> dict[str, str]:
        """The absolute paths of the files that the settings name, by the paths that are written in `identity`."""
        constraints = (constraint.text for constraint in self.constraints)
        return files_in(self.scheme, *task.specs, *constraints, *self._objective_names)

    @property
    def _objective_names(self) -> list[str]:
        return list(map(name_of, self.objectives))

    def budget(self) -> dict[str, Any]:
        """The settings that may change when the study is resumed: JSON types only."""
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
