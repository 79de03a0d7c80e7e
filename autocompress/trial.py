"""One trial: compress in one configuration, recover, realize, score on val, measure. A pure function."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.special import ndtri
from torch import Tensor, nn

from autocompress.certify import drop_standard_error
from autocompress.gauges.macs import count_params
from autocompress.goal import Objective
from autocompress.lc import LearningCompression
from autocompress.learning.polish import Hopeless
from autocompress.learning.state import Recovered, State
from autocompress.measurement import Measurement, compare
from autocompress.networks.deployed import deployed
from autocompress.progress import span
from autocompress.recovery import Recovery, suiting
from autocompress.scheme import Facts, Scheme, Theta, Weights, realize_by_part
from autocompress.task import Evaluation, Task, channels_last, device_of, evaluating
from autocompress.verdict.constraint import Checked
from autocompress.verdict.limit import Limit, Requirement, check_all

TRAINING_SHARE = 0.95  # of a trial's time, as a rule; the rest builds, scores and measures the model

# The test that ends a recovery. What it will have lost in the end is at least this share of what the compressed
# model has lost in the middle of the polish: on the digits it was never less than 0.69.
REMAINS = 0.5
ERROR = 0.01  # probability that a trial at the bound is given up
# A recovery from the dense model leaves starts on its way: at these multiples of its density, up to the highest
# that is worth more than the dense model.
PATH, PATH_HIGHEST = (2, 4, 8), 0.7


@dataclass(frozen=True)
class Bound:
    """How much of the metric may be lost.

    Attributes:
        max_drop: 0.01 is one point, or 1% of the dense model's score if ``relative``.
        relative: Whether the drop is counted as a share of the dense model's score.
    """

    max_drop: float
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop={self.max_drop!r}; it must be at least 0 and below 1 (0.01 is one point)")


@dataclass(frozen=True)
class Start:
    """Where a trial may start from, in place of the dense model.

    Attributes:
        trial: The number of the trial that left it.
        density: Its density.
        weights: The state dict of the dense architecture, with what is compressed away at its compressed value.
    """

    trial: int
    density: float
    weights: Weights


@dataclass(frozen=True)
class TrialSpec:
    """Everything that a trial needs; the same spec gives the same result on the same machine.

    Attributes:
        number: The trial's number in its study, from 1: the dense model is 0.
        density: What the search proposes.
        task: The dense model, the data and the metric.
        scheme: How to compress.
        facts: What the scheme found out about the model, once for the study.
        recovery: How to compress and train.
        objectives: What the search optimizes.
        bound: What may be lost.
        dense: The dense model's evaluation on val.
        seed: Seeds the trial.
        device: Where it runs, as torch names it.
        timing: Whether the objective or a constraint needs latency, memory or energy.
        dense_cost: What the dense model costs, for objectives that are relative to it.
        runtime: What runs the model where its latency is measured, see `autocompress.gauges.runtimes.RUNTIMES`.
        profile_device: Where it is measured; None for ``device``.
        constraints: What else the compressed model must reach on val, and what it may cost.
        start: A denser model of an earlier trial to start from; None for the dense model.
        cheap: Whether the trial gives up when it cannot make it, and leaves starts for others.
        params: What else the search proposed, by name; it is in the scheme and the recovery already.
    """

    number: int
    density: float
    task: Task
    scheme: Scheme
    facts: Facts
    recovery: Recovery
    objectives: tuple[Objective, ...]
    bound: Bound
    dense: Evaluation
    seed: int
    device: str = "cpu"
    timing: bool = False
    constraints: tuple[Requirement, ...] = ()
    start: Start | None = None
    cheap: bool = False
    dense_cost: Measurement | None = None
    runtime: str = "eager"
    profile_device: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialResult:
    """What a trial found.

    Attributes:
        number: The trial's number in its study, from 1: the dense model is 0.
        density_asked: The density that the search proposed.
        density: The density of the realized model, at most the one asked for.
        score: The metric on val.
        drop: What was lost on val against the dense model, as the study counts it (absolute or relative);
            0.01 is one point.
        drop_se: Standard error of ``drop``, from the samples that one model gets right and the other wrong.
        feasible: Whether ``drop`` is within the study's bound and the constraints are met.
        values: The objectives, in their order.
        seconds: Wall time of the whole trial.
        measurement: What the realized model costs.
        plan: What `Scheme.realize` needs to build the architecture again; JSON types only.
        curves: What recovery logged, by name: one number per C step.
        model: The realized model, in eval mode on the CPU; None when the trial was read back from disk.
        constraints: What came of each constraint, of metrics on val.
        steps: Gradient steps taken.
        start: The number of the trial whose model it started from; None for the dense model.
        start_density: The density of that model.
        given_up_at: The share of the polish at which it was rejected; None if its recovery came to its end.
        recovery: Which it was, see `autocompress.recovery.RECOVERIES`: what ``auto`` came to for its scheme.
        starts: By density: the state dicts that denser trials and sparser ones can start from; not on disk with
            the record, but beside it.
        params: What the search proposed beside the density, by name.
    """

    number: int
    density_asked: float
    density: float
    score: float
    drop: float
    drop_se: float
    feasible: bool
    values: tuple[float, ...]
    seconds: float
    measurement: Measurement
    plan: Mapping[str, Any]
    curves: Mapping[str, tuple[float, ...]]
    model: nn.Module | None = None
    constraints: tuple[Checked, ...] = ()
    steps: int = 0
    start: int | None = None
    start_density: float = 1.0
    given_up_at: float | None = None
    recovery: str = ""
    starts: Mapping[float, Weights] = field(default_factory=dict, compare=False, repr=False)
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The objective, or the first of several."""
        return self.values[0]

    @property
    def rejected(self) -> bool:
        """Whether the trial was given up before its end, because it could not make it."""
        return self.given_up_at is not None

    @property
    def standing(self) -> str:
        """Whether it is feasible, in a word for tables."""
        return "rejected" if self.rejected else "yes" if self.feasible else "no"

    def effective_drop(self, max_drop: float) -> tuple[float, float]:
        """The drop as the search counts it, with its standard error: beyond the bound by what is missed most.

        A density is feasible where the drop D(u) is within its bound and every excess e_k(u) of a constraint
        is at most 0, which is where max(D, bound + e_k) is within the bound: one curve, again nearly monotone,
        that crosses the bound where the first of them fails. So the search and its answer need to know of one
        threshold only. The maximum of noisy numbers errs to the safe side.

        What a constraint on a cost misses is no part of it: the cost falls where the drop rises.

        Of a trial that was rejected it is the least that it would have lost in the end.
        """
        if self.given_up_at is not None:
            return REMAINS * self.drop, REMAINS * self.drop_se
        drops = [(max_drop + one.excess, one.se) for one in self.constraints if not one.is_cost]
        return max([(self.drop, self.drop_se), *drops])


def run_trial(spec: TrialSpec) -> TrialResult:
    """Runs one trial in whatever process it is called.

    Where the device runs out of memory, it runs a second time in batches of half the size; the result's curves
    then hold a ``batch_size``.

    Raises:
        RealizationError: If the realized model does not compute what the masked model computes.
        FloatingPointError: If the training diverged, or the metric is no finite number.
        torch.OutOfMemoryError: If half of a batch was too much, too.
    """
    try:
        return _run(spec)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Out here, where the traceback no longer holds what filled the memory.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    halved = replace(spec, task=spec.task.in_half_batches())
    size = halved.task.train.batch_size
    try:
        result = _run(halved)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise torch.OutOfMemoryError(f"out of memory, in batches of {size} as well: {reason}") from error
    return replace(result, curves={**result.curves, "batch_size": (float(size),)})


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has run out of memory, or the CPU, for which torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run(spec: TrialSpec) -> TrialResult:
    began = time.perf_counter()
    task, scheme = spec.task.on(spec.device), spec.scheme
    torch.manual_seed(spec.seed)
    model = copy.deepcopy(task.model)
    with span(0, TRAINING_SHARE):
        recovered, starts = _recover(spec, task, model)
    realized = realize(scheme, model.eval(), recovered.theta, spec.facts, next(task.val.batches())[0])
    with span(TRAINING_SHARE, 1):
        evaluation = task.evaluate(deployed(realized, task.example_input), task.val)
    if not math.isfinite(evaluation.score):
        raise FloatingPointError(f"the {task.metric.name} of the compressed model is {evaluation.score}")
    measurement, dense_cost = _costs(spec, task, realized, recovered.theta.kept)
    drop = task.metric.drop(spec.dense.score, evaluation.score, relative=spec.bound.relative)
    constraints = check_all(spec.constraints, evaluation, measurement, dense_cost)
    finished = recovered.given_up_at is None
    feasible = finished and drop <= spec.bound.max_drop and all(one.met for one in constraints)
    if spec.cheap and feasible:
        starts[spec.density] = {name: t.cpu() for name, t in model.state_dict().items()}
    return TrialResult(
        number=spec.number,
        density_asked=spec.density,
        density=measurement.density,
        score=evaluation.score,
        drop=drop,
        drop_se=drop_standard_error(task.metric, spec.dense, evaluation, relative=spec.bound.relative),
        feasible=feasible,
        values=tuple(objective(measurement, dense_cost) for objective in spec.objectives),
        seconds=time.perf_counter() - began,
        measurement=measurement,
        plan=recovered.theta.plan,
        curves=recovered.curves,
        model=realized.cpu(),
        constraints=constraints,
        steps=recovered.steps,
        start=spec.start.trial if spec.start else None,
        start_density=spec.start.density if spec.start else 1.0,
        given_up_at=recovered.given_up_at,
        recovery=suiting(spec.recovery, scheme, task.train).method,
        starts=starts,
        params=dict(spec.params),
    )


def can_be_cheap(recovery: Recovery) -> bool:
    """Whether trials can start from each other and give up early: where the density falls on the way."""
    return isinstance(recovery, LearningCompression) and recovery.alternating > 0


def _recover(spec: TrialSpec, task: Task, model: nn.Module) -> tuple[Recovered, dict[float, Weights]]:
    """The recovery, and what it leaves on its way for denser trials to start from."""
    recovery = suiting(spec.recovery, spec.scheme, task.train)  # by the whole budget, before it is shortened
    if not spec.cheap or not isinstance(recovery, LearningCompression):
        return recovery.recover(model, spec.scheme, spec.facts, spec.density, task, spec.seed), {}
    path: dict[int, tuple[float, Weights]] = {}

    def leave(state: State) -> None:
        density = state.curves["lc_density"][-1]
        for multiple in PATH:
            if multiple * spec.density <= density <= PATH_HIGHEST:
                assert state.learner is not None
                path[multiple] = density, {name: t.cpu() for name, t in state.learner.under("model").items()}

    start = spec.start
    recovered = (recovery.shortened(start.density, spec.density, task.train) if start else recovery).recover(
        model,
        spec.scheme,
        spec.facts,
        spec.density,
        task,
        spec.seed,
        start=State.warm(start.density, start.weights) if start else None,
        checkpoint=None if start else leave,
        hopeless=_sequential_test(spec, task),
    )
    return recovered, dict(path.values())


def _sequential_test(spec: TrialSpec, task: Task) -> Hopeless:
    """Whether a recovery cannot make it: what will remain of its drop is beyond the bound, beyond the noise."""
    z = float(ndtri(1 - ERROR))

    def hopeless(model: nn.Module) -> bool:
        evaluation = task.evaluate(model, task.val)
        drop = task.metric.drop(spec.dense.score, evaluation.score, relative=spec.bound.relative)
        error = drop_standard_error(task.metric, spec.dense, evaluation, relative=spec.bound.relative)
        return REMAINS * (drop - z * error) > spec.bound.max_drop

    return hopeless


def _costs(spec: TrialSpec, task: Task, realized: nn.Module, kept: int) -> tuple[Measurement, Measurement | None]:
    """What the realized model costs, and the dense one: timed beside it where the objective compares them."""
    limits = [one.objective for one in spec.constraints if isinstance(one, Limit)]
    measured = (*spec.objectives, *limits)
    beside = [task.model] if spec.timing and any(one.is_relative for one in measured) else []
    dense_params = count_params(task.model)
    cost, *dense = compare(
        [realized, *beside],
        task.example_input,
        spec.profile_device or spec.device,
        dense_params=dense_params,
        params=[kept, *(dense_params for _ in beside)],
        timing=spec.timing,
        runtimes=(spec.runtime,),
    )
    return cost, dense[0] if dense else spec.dense_cost


class RealizationError(RuntimeError):
    """A realized model does not compute what the masked model computes."""


def realize(scheme: Scheme, masked: nn.Module, theta: Theta, facts: Facts, batch: Tensor) -> nn.Module:
    """Realizes θ and checks, part by part of a composition, that the outputs on a batch are still the same.

    Args:
        scheme: The scheme.
        masked: The dense architecture with the decompressed θ, in eval mode.
        theta: The compressed weights.
        facts: What the scheme found out about the dense model.
        batch: Inputs of shape ``(n, ...)``.

    Raises:
        RealizationError: If an output moved by more than the scheme's tolerance.
    """
    model, expected = masked, _outputs(masked, batch)
    for part, model in realize_by_part(scheme, masked, theta, facts):
        outputs = _realized_outputs(part, model, batch)
        error = float((outputs - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not error <= part.tolerance:
            raise RealizationError(
                f"the model realized by {type(part).__name__} is off by {error:.1e} of the largest output "
                f"(allowed: {part.tolerance:.0e}); it was not used"
            )
        expected = outputs
    return channels_last(model.eval())


def _realized_outputs(part: Scheme, model: nn.Module, batch: Tensor) -> Tensor:
    try:
        return _outputs(model, batch)
    except RuntimeError as error:
        raise RealizationError(f"the model realized by {type(part).__name__} does not run: {error}") from error


def _outputs(model: nn.Module, batch: Tensor) -> Tensor:
    # TF32, which GPUs convolve in by default, is coarser than the difference that is looked for.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with exact, evaluating(model), torch.inference_mode():
        outputs: Tensor = model(batch.to(device_of(model))).float()
    return outputs
