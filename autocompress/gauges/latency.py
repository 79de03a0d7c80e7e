"""Latency: the time of a forward pass, measured for several models in alternation."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autocompress import progress

MIN_REPEATS = 20
WARM_UP = 3
# Timing ends when the median is known to this share of itself, with about 95% confidence.
PRECISION = 0.03
# Seconds and passes that are timed of a model before the next model's turn: few, so that drift affects all models
# alike, but enough that the turn's first pass, which is not timed, costs little. That pass finds another model's
# data in the caches, and its own threads asleep.
TURN_S, TURN_PASSES = 0.002, 3


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        batch: Samples in the pass.
        p50_ms: Median, in milliseconds.
        p95_ms: 95th percentile, in milliseconds.
        repeats: The number of timed passes.
        interval: Half of the median's 95% confidence interval, as a share of the median: 0.02 is ± 2%. None in
            records of versions that did not store it.
        runtime: The runtime that ran the model, see `autocompress.gauges.runtimes.RUNTIMES`.
    """

    batch: int
    p50_ms: float
    p95_ms: float
    repeats: int
    interval: float | None = None
    runtime: str = "eager"

    @property
    def throughput_per_s(self) -> float:
        """Samples a second."""
        return 1e3 * self.batch / self.p50_ms


def time_in_turns(
    runs: Sequence[Callable[[Tensor], object]], batches: Sequence[Tensor], budget_s: float, runtime: str = "eager"
) -> list[list[Latency]]:
    """Times batches through models, in turns of some passes: A B A B ..., so that drift affects all alike.

    A turn begins with a pass that is not timed, so that each model is timed as if it ran alone. Turns are taken
    until each model's median is known to `PRECISION`, or the budget is spent.

    Args:
        runs: The models.
        batches: Batches of shape ``(n, ...)``, on the models' device.
        budget_s: Seconds per model and batch after which timing ends, with at least `MIN_REPEATS` passes.
        runtime: The runtime of the models, for the record.

    Returns:
        For each model its latency at each batch.
    """
    began, timed = time.perf_counter(), [_OneBatch(runs, x, budget_s * len(runs)) for x in batches]
    while unfinished := [one for one in timed if not one.is_done(time.perf_counter() - began)]:
        for one in unfinished:
            one.take_turns()
        progress.report(sum(one.share for one in timed) / len(timed))
    return [[one.latency(i, runtime) for one in timed] for i in range(len(runs))]


class _OneBatch:
    """The timed passes of one batch through each model."""

    def __init__(self, runs: Sequence[Callable[[Tensor], object]], x: Tensor, budget_s: float) -> None:
        self.runs, self.x, self.budget_s, self.spent_s = runs, x, budget_s, 0.0
        self.times_ms: list[list[float]] = [[] for _ in runs]
        for run in runs:
            for _ in range(WARM_UP):
                _timed_ms(run, x)

    def take_turns(self) -> None:
        began = time.perf_counter()
        for run, times in zip(self.runs, self.times_ms, strict=True):
            _timed_ms(run, self.x)
            before, turn_ms = len(times), 0.0
            while turn_ms < 1e3 * TURN_S or len(times) - before < TURN_PASSES:
                times.append(_timed_ms(run, self.x))
                turn_ms += times[-1]
        self.spent_s += time.perf_counter() - began

    @property
    def share(self) -> float:
        """The share of the timing that is done, from 0 to 1; at least that."""
        return min(1.0, min(map(len, self.times_ms)) / MIN_REPEATS, self.spent_s / self.budget_s)

    def is_done(self, elapsed_s: float) -> bool:
        if min(map(len, self.times_ms)) < MIN_REPEATS:
            return False
        # Passes close in time are correlated, so their interval is too narrow: a quarter of the budget at least.
        precise = elapsed_s > self.budget_s / 4 and all(interval(times) <= PRECISION for times in self.times_ms)
        return precise or self.spent_s >= self.budget_s

    def latency(self, nth: int, runtime: str) -> Latency:
        """The latency of one of the models."""
        t = self.times_ms[nth]
        middle, late = float(np.median(t)), float(np.percentile(t, 95))
        return Latency(len(self.x), middle, late, len(t), interval(t), runtime)


def _timed_ms(run: Callable[[Tensor], object], x: Tensor) -> float:
    """Milliseconds of one forward pass: by the clock on a CPU, by CUDA events on a GPU."""
    if x.device.type == "cpu":
        start = time.perf_counter()
        run(x)
        return 1e3 * (time.perf_counter() - start)
    stream = torch.cuda.current_stream(x.device)
    timer: Callable[..., torch.cuda.Event] = torch.cuda.Event  # whose constructor has no types
    begin, end = timer(enable_timing=True), timer(enable_timing=True)
    stream.record_event(begin)
    run(x)
    stream.record_event(end)
    end.synchronize()
    return float(begin.elapsed_time(end))


def interval(times: Sequence[float]) -> float:
    """Half of the median's 95% confidence interval, as a share of the median.

    By order statistics: of n sorted times, those of rank n/2 ± 0.98 √n enclose the median with that confidence.
    """
    n, half = len(times), 0.98 * math.sqrt(len(times))
    ranked = np.sort(times)
    low, high = ranked[max(math.floor(n / 2 - half), 0)], ranked[min(math.ceil(n / 2 + half), n - 1)]
    return float((high - low) / 2 / np.median(ranked))
