"""Latency: how long a forward pass takes, of several models beside each other."""

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
# Timed of a model before it is another's turn: little against drift, so much that the turn's first pass, which is
# not timed, costs little. That pass finds the caches full of another model and its own threads asleep.
TURN_S, TURN_PASSES = 0.002, 3


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        batch: Samples in the pass.
        p50_ms: Median, in milliseconds.
        p95_ms: 95th percentile, in milliseconds.
        repeats: Timed passes behind the two.
        interval: Half of the median's 95% confidence interval, as a share of the median: 0.02 is ± 2%. None in
            what was recorded by versions that did not store it.
        runtime: What ran the model, see `autocompress.gauges.runtimes.RUNTIMES`.
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
    runs: Sequence[Callable[[Tensor], object]], x: Tensor, budget_s: float, runtime: str = "eager"
) -> list[Latency]:
    """Times one batch through each model, in turns of some passes: A B A B ..., so that drift meets all alike.

    A turn begins with a pass that is not timed, so that each model is timed as if it ran alone. Each median is
    known to `PRECISION` in the end, unless the budget is spent before.

    Args:
        runs: The models.
        x: A batch of shape ``(n, ...)``, on the models' device.
        budget_s: Seconds per model after which a median is taken as it is, if it has 20 repeats behind it.
        runtime: What runs the models, for the record.
    """
    for run in runs:
        for _ in range(WARM_UP):
            _timed_ms(run, x)
    times_ms: list[list[float]] = [[] for _ in runs]
    began, budget_s, spent_s = time.perf_counter(), budget_s * len(runs), 0.0
    while min(map(len, times_ms)) < MIN_REPEATS or spent_s < budget_s:
        for run, times in zip(runs, times_ms, strict=True):
            _timed_ms(run, x)
            before, turn_ms = len(times), 0.0
            while turn_ms < 1e3 * TURN_S or len(times) - before < TURN_PASSES:
                times.append(_timed_ms(run, x))
                turn_ms += times[-1]
        spent_s = time.perf_counter() - began
        progress.report(min(1.0, min(map(len, times_ms)) / MIN_REPEATS, spent_s / budget_s))
        # A few passes in a row agree with each other more than with the next second's: not before a quarter.
        enough = spent_s > budget_s / 4 and min(map(len, times_ms)) >= MIN_REPEATS
        if enough and all(interval(times) <= PRECISION for times in times_ms):
            break
    return [
        Latency(len(x), float(np.median(t)), float(np.percentile(t, 95)), len(t), interval(t), runtime)
        for t in times_ms
    ]


def _timed_ms(run: Callable[[Tensor], object], x: Tensor) -> float:
    """Milliseconds of one forward pass: by the wall clock on a CPU, by the device's own events on a GPU."""
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

    From order statistics: of n sorted times, those of rank n/2 ± 0.98 √n enclose the median with that confidence.
    """
    n, half = len(times), 0.98 * math.sqrt(len(times))
    ranked = np.sort(times)
    low, high = ranked[max(math.floor(n / 2 - half), 0)], ranked[min(math.ceil(n / 2 + half), n - 1)]
    return float((high - low) / 2 / np.median(ranked))
