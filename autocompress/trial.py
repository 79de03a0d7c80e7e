"""One trial: compress at one density, recover, realize, score on val, measure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autocompress.measure import Measurement


@dataclass(frozen=True)
class TrialResult:
    """What a trial found.

    Attributes:
        number: The trial's number in its study, from 0.
        density_asked: The density that the search proposed.
        density: The density of the realized model, at most the one asked for.
        score: The metric on val.
        drop: What was lost on val against the dense model, as the study counts it (absolute or relative);
            0.01 is one point.
        drop_se: Standard error of ``drop``, from the samples that one model gets right and the other wrong.
        feasible: Whether ``drop`` is within the study's bound.
        value: The objective.
        seconds: Wall time of the whole trial.
        measurement: What the realized model costs.
        plan: What `Scheme.realize` needs to build the architecture again; JSON types only.
        curves: What recovery logged, by name: one number per C step.
        model: The realized model, in eval mode on the CPU; None when the trial was read back from disk.
    """

    number: int
    density_asked: float
    density: float
    score: float
    drop: float
    drop_se: float
    feasible: bool
    value: float
    seconds: float
    measurement: Measurement
    plan: Mapping[str, Any]
    curves: Mapping[str, tuple[float, ...]]
    model: nn.Module | None = None
