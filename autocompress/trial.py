"""One trial: compress in one configuration, recover, realize, score on val, measure. A pure function.

A *cheap* trial saves time: it may start from the model of an earlier, denser trial instead of the dense model, it
leaves such models ("starts") for others, and it gives up in the middle of its polish if it can hardly meet the
bound.
"""

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

TRAINING_SHARE = 0.95  # typical share of a trial's time; the rest builds, scores and measures the model

# The test by which a trial is given up assumes that the final drop is at least this share of the drop in the
# middle of the polish; on the digits it was never less than 0.69.
REMAINS = 0.5
ERROR = 0.01  # probability that a trial whose final drop would be at the bound is given up
# A recovery from the dense model leaves starts at these multiples of its density, up to the highest density from
# which starting is cheaper than from the dense model.
PATH, PATH_HIGHEST = (2, 4, 8), 0.7


@dataclass(frozen=True)
class Bound:
    """The largest allowed drop of the metric.

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
    """A model that a trial may start from instead of the dense model.

    Attributes:
        trial: The number of the trial that left it.
        density: Its density.
        weights: Its state dict in the dense architecture; pruned entries have their compressed values.
    """

    trial: int
    density: float
    weights: Weights


@dataclass(frozen=True)
class TrialSpec:
    """Everything that a trial needs; the same spec gives the same result on the same machine.

    Attributes:
        number: The trial's number in its study, from 1: the dense model is 0.
        density: The target density, proposed by the search.
        task: The dense model, the data and the metric.
        scheme: The scheme that compresses.
        facts: The result of the scheme's `analyze`, which is computed once per study.
        recovery: The method that compresses and trains.
        objectives: The numbers that the search optimizes.
        bound: The largest allowed drop.
        dense: The dense model's evaluation on val.
        seed: Seeds the trial.
        device: The device to train on, as torch names it.
        timing: Whether the objective or a constraint needs latency, memory or energy.
        dense_cost: The dense model's measurement, for objectives that are relative to it.
        runtime: The runtime of latency measurements, see `autocompress.gauges.runtimes.RUNTIMES`.
        profile_device: The device of measurements; None for ``device``.
        constraints: Further conditions on val scores and on costs.
        start: A denser model of an earlier trial to start from; None for the dense model.
        cheap: Whether the trial may give up early and leaves starts for others.
        params: Further parameters proposed by the search, by name; scheme and recovery have them already.
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
    """The result of a trial.

    Attributes:
        number: The trial's number in its study, from 1: the dense model is 0.
        density_asked: The density that the search proposed.
        density: The density of the realized model, at most the one asked for.
        score: The metric on val.
        drop: The drop on val from the dense model, as the study counts it (absolute or relative); 0.01 is one
            point.
        drop_se: Standard error of ``drop``, see `autocompress.certify.drop_standard_error`.
        feasible: Whether ``drop`` is within the study's bound and the constraints are met.
        values: The objectives, in the order of the study's.
        seconds: Wall time of the whole trial.
        measurement: The costs of the realized model.
        plan: What `Scheme.realize` needs to build the architecture again; JSON types only.
        curves: The logs of the recovery, by name: one number per C step.
        model: The realized model, in eval mode on the CPU; None if the trial was read from disk.
        constraints: The checked constraints, scores among them on val.
        steps: Gradient steps taken.
        start: The number of the trial whose model it started from; None for the dense model.
        start_density: The density of that model.
        given_up_at: The share of the polish after which it was rejected; None if its recovery was completed.
        recovery: The recovery's name in `autocompress.recovery.RECOVERIES`, with ``auto`` resolved.
        starts: State dicts that other trials can start from, by density; stored beside the record, not in it.
        params: Parameters that the search proposed beside the density, by name.
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
        """Whether the trial was given up before its end, because it could hardly meet the bound."""
        return self.given_up_at is not None

    @property
    def standing(self) -> str:
        """Whether it is feasible, as a word for tables: yes, no or rejected."""
        return "rejected" if self.rejected else "yes" if self.feasible else "no"

    def effective_drop(self, max_drop: float) -> tuple[float, float]:
        """The drop that the search models, with its standard error: the constraints' excesses count as drops.

        At log density u, the drop D(u) must be at most the bound and each constraint's excess e_k(u) at most 0.
        Both hold where max(D, bound + e_k) is at most the bound. That maximum is again a nearly monotone curve of
        u, so the search needs to model one curve and one threshold only. The maximum of noisy numbers errs on the
        safe side. Limits on costs are left out: costs fall where the drop rises.

        For a rejected trial this is a lower bound on the drop that it would have had in the end.

        Args:
            max_drop: The study's bound on the drop, as a fraction.
        """
        if self.given_up_at is not None:
            return REMAINS * self.drop, REMAINS * self.drop_se
        scores = [checked for checked in self.constraints if not checked.is_cost]
        return max([(self.drop, self.drop_se), *((max_drop + checked.excess, checked.se) for checked in scores)])


def run_trial(spec: TrialSpec) -> TrialResult:
    """Runs one trial in the current process.

    If the device runs out of memory, the trial is run again in batches of half the size; the result's curves
    then hold a ``batch_size``.

    Raises:
        RealizationError: If the realized model does not compute what the masked model computes.
        FloatingPointError: If the training diverged, or the metric is not a finite number.
        torch.OutOfMemoryError: If the memory does not suffice for half a batch either.
    """
    try:
        return _run(spec)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Not inside the except block, where the traceback still references the tensors that filled the memory.
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
    """Whether a GPU, or the CPU, for which torch has no error class, has run out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _run(spec: TrialSpec) -> TrialResult:
    start = time.perf_counter()
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
    completed = recovered.given_up_at is None
    feasible = completed and drop <= spec.bound.max_drop and all(checked.met for checked in constraints)
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
        seconds=time.perf_counter() - start,
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
    """Whether trials with this recovery can start from each other and give up early.

    They can where the density falls gradually, which leaves models of higher densities on the way.
    """
    return isinstance(recovery, LearningCompression) and recovery.alternating > 0


def _recover(spec: TrialSpec, task: Task, model: nn.Module) -> tuple[Recovered, dict[float, Weights]]:
    """Recovers ``model`` in place; a cheap trial also returns the starts that it passed, by density."""
    recovery = suiting(spec.recovery, spec.scheme, task.train)  # for the whole budget, before it is shortened
    if not spec.cheap or not isinstance(recovery, LearningCompression):
        return recovery.recover(model, spec.scheme, spec.facts, spec.density, task, spec.seed), {}
    path: dict[int, tuple[float, Weights]] = {}

    def keep_start(state: State) -> None:
        density = state.curves["lc_density"][-1]
        for multiple in PATH:
            if multiple * spec.density <= density <= PATH_HIGHEST:
                assert state.learner is not None
                path[multiple] = density, {name: t.cpu() for name, t in state.learner.under("model").items()}

    start = spec.start
    if start:
        recovery = recovery.shortened(start.density, spec.density, task.train)
    recovered = recovery.recover(
        model,
        spec.scheme,
        spec.facts,
        spec.density,
        task,
        spec.seed,
        start=State.warm(start.density, start.weights) if start else None,
        checkpoint=None if start else keep_start,
        hopeless=_sequential_test(spec, task),
    )
    return recovered, dict(path.values())


def _sequential_test(spec: TrialSpec, task: Task) -> Hopeless:
    """A test that gives up a recovery if its final drop will exceed the bound with probability 1 - `ERROR`."""
    z = float(ndtri(1 - ERROR))

    def hopeless(model: nn.Module) -> bool:
        evaluation = task.evaluate(model, task.val)
        drop = task.metric.drop(spec.dense.score, evaluation.score, relative=spec.bound.relative)
        error = drop_standard_error(task.metric, spec.dense, evaluation, relative=spec.bound.relative)
        return REMAINS * (drop - z * error) > spec.bound.max_drop

    return hopeless


def _costs(spec: TrialSpec, task: Task, realized: nn.Module, kept: int) -> tuple[Measurement, Measurement | None]:
    """The measurements of the realized model and of the dense one.

    The dense model is timed again, in turns with the realized one, if an objective or a limit compares the two.
    """
    limits = [limit.objective for limit in spec.constraints if isinstance(limit, Limit)]
    is_relative = any(objective.is_relative for objective in (*spec.objectives, *limits))
    dense_models = [task.model] if spec.timing and is_relative else []
    dense_params = count_params(task.model)
    cost, *dense_costs = compare(
        [realized, *dense_models],
        task.example_input,
        spec.profile_device or spec.device,
        dense_params=dense_params,
        params=[kept, *(dense_params for _ in dense_models)],
        timing=spec.timing,
        runtimes=(spec.runtime,),
    )
    return cost, dense_costs[0] if dense_costs else spec.dense_cost


class RealizationError(RuntimeError):
    """A realized model does not compute what the masked model computes."""


def realize(scheme: Scheme, masked: nn.Module, theta: Theta, facts: Facts, batch: Tensor) -> nn.Module:
    """Realizes θ and checks, after each part of a composition, that the outputs on a batch are still the same.

    Args:
        scheme: The scheme.
        masked: The dense architecture with the decompressed θ, in eval mode.
        theta: The compressed weights.
        facts: The result of the scheme's `analyze`.
        batch: Inputs of shape ``(n, ...)``.

    Raises:
        RealizationError: If outputs differ by more than the scheme's tolerance, or the model does not run.
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
    # The rounding of TF32, in which GPUs convolve by default, would hide the differences to be found.
    full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with full_precision, evaluating(model), torch.inference_mode():
        outputs: Tensor = model(batch.to(device_of(model))).float()
    return outputs
