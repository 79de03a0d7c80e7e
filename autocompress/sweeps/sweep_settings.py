"""The settings of a sweep, checked, and the trials that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autocompress.metrics import Metric
from autocompress.plugins import files_in, name_of
from autocompress.recovery import Recovery, settings_of
from autocompress.scheme import Scheme
from autocompress.sweeps.sweep_grid import Cell, grid
from autocompress.task import Task


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep.

    Attributes:
        schemes: The schemes by their specs.
        densities: The target densities of each scheme that takes one.
        repeats: Number of runs of each scheme and density.
        recovery: The recovery of each trial.
        timing: Whether latency, memory and energy are measured, too.
        seed: Seeds the trials.
        device: The device on which trials run.
        metrics: Further metrics to score, beside the task's own.
    """

    schemes: Mapping[str, Scheme]
    densities: tuple[float, ...]
    repeats: int
    recovery: Recovery
    timing: bool
    seed: int
    device: str
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}; it must be at least 0")

    @property
    def cells(self) -> list[Cell]:
        """All trials, in order."""
        return list(grid(self.schemes, self.densities, self.repeats))

    def identity(self, task: Task) -> dict[str, Any]:
        """The settings that must be the same when the sweep is resumed: JSON types only."""
        return {
            "kind": "sweep",
            "task": task.name,
            "scheme": "sweep",
            "fingerprint": task.fingerprint(),
            "metric": name_of(task.metric),
            "schemes": list(self.schemes),
            "densities": list(self.densities),
            "repeats": self.repeats,
            "also": list(map(name_of, self.metrics)),
            "timing": self.timing,
            "seed": self.seed,
            "recovery": settings_of(self.recovery),
        }

    def files(self, task: Task) -> dict[str, str]:
        """The absolute paths of the files that the settings name, by the paths that are written in `identity`."""
        return files_in(*self.schemes, *task.specs, *map(name_of, self.metrics))
