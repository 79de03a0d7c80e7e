"""Measurement: what a model costs. Every number is measured here or absent."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from autocompress import progress
from autocompress.gpu import GpuWindow
from autocompress.task import device_of, evaluating
from autocompress.weights import to_bytes

MIN_REPEATS = 20
# Timing ends when the median is known to this share of itself, with about 95% confidence.
MEDIAN_PRECISION = 0.03
# Long against the 20 to 100 ms between two steps of a GPU's energy counter.
ENERGY_WINDOW_S = 2.0


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        batch: Samples in the pass.
        p50_ms: Median, in milliseconds.
        p95_ms: 95th percentile, in milliseconds.
        repeats: Timed passes behind the two.
    """

    batch: int
    p50_ms: float
    p95_ms: float
    repeats: int


@dataclass(frozen=True)
class Measurement:
    """What a model costs; a field that was not or cannot be measured is None.

    Attributes:
        density: Parameters kept over parameters of the dense model.
        params: Parameters kept.
        size_bytes: The saved weights on disk.
        macs: Multiply-accumulate operations of one sample's forward pass.
        device: Where it was measured, e.g. ``"cpu"`` or ``"cuda:0 NVIDIA H200"``.
        latency: Per batch size, smallest first; empty when no time was taken.
        peak_memory_bytes: Weights plus the most that one forward pass at the largest batch allocated at once
            (its input left out).
        gpu_memory_bytes: Memory in use on the whole GPU (NVML).
        gpu_utilization_pct: Share of the time in which a kernel ran (NVML).
        gpu_power_w: Mean power while it ran (NVML).
        energy_j: Energy of one sample's inference at the largest batch (NVML's energy counter).
    """

    density: float
    params: int
    size_bytes: int
    macs: int
    device: str
    latency: tuple[Latency, ...] = ()
    peak_memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    gpu_utilization_pct: float | None = None
    gpu_power_w: float | None = None
    energy_j: float | None = None

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Measurement":
        """A measurement from its fields as they were written to disk; unknown ones are left out."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in record.items() if name in known}
        return cls(**given | {"latency": tuple(Latency(**one) for one in record.get("latency", ()))})

    @property
    def latency_ms(self) -> float | None:
        """Median time of one forward pass at the smallest batch measured (1 by default)."""
        return self.latency[0].p50_ms if self.latency else None

    @property
    def throughput_per_s(self) -> float | None:
        """Samples a second at the largest batch measured (32 by default)."""
        return 1e3 * self.latency[-1].batch / self.latency[-1].p50_ms if self.latency else None


def measure(
    model: nn.Module,
    example_input: Tensor,
    device: str | torch.device = "cpu",
    *,
    dense_params: int | None = None,
    params: int | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    timing: bool = True,
    budget_s: float = 0.6,
) -> Measurement:
    """What one model costs, see `compare`."""
    return compare(
        [model],
        example_input,
        device,
        dense_params=dense_params,
        params=[params],
        batch_sizes=batch_sizes,
        timing=timing,
        budget_s=budget_s,
    )[0]


def compare(
    models: Sequence[nn.Module],
    example_input: Tensor,
    device: str | torch.device = "cpu",
    *,
    dense_params: int | None = None,
    params: Sequence[int | None] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    timing: bool = True,
    budget_s: float = 0.6,
) -> list[Measurement]:
    """What several models cost. Their forward passes take turns, so that drift meets all of them alike.

    Args:
        models: They take float32 batches; none is changed, in mode, device or weights.
        example_input: A batch of shape ``(n, ...)``; its first sample is measured with.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        dense_params: Parameters of the dense model, for the density; by default each model's own ``params``.
        params: Parameters kept, per model, where they are fewer than the model holds (zeros do not count).
        batch_sizes: Samples a forward pass, for latency; memory and energy are taken at the largest.
        timing: Whether to run the models at all beyond counting: latency, memory, power and energy.
        budget_s: Seconds of timing per model and batch size after which a median is taken as it is, if it has
            20 repeats behind it.

    Raises:
        ValueError: If the device is not there or a batch size is not positive.
    """
    device = _checked(device)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes={tuple(batch_sizes)}; give one or more positive numbers of samples")
    sample = example_input[:1].detach()
    given = params or [None] * len(models)
    results = [_count(m, sample, dense_params, n, device) for m, n in zip(models, given, strict=True)]
    if not timing:
        return results
    on_device = [m if device_of(m) == device else copy.deepcopy(m).to(device) for m in models]
    with ExitStack() as modes, torch.inference_mode():
        for model in on_device:
            modes.enter_context(evaluating(model))
        batches = [_batch(sample, n, device) for n in sorted(set(batch_sizes))]
        timed = []
        for done, x in enumerate(batches):
            with progress.span(done / len(batches), (done + 1) / len(batches)):
                timed.append(_latencies(on_device, x, budget_s))
        latencies = zip(*timed, strict=True)
        return [
            _with_resources(replace(result, latency=latency), model, batches[-1])
            for result, latency, model in zip(results, latencies, on_device, strict=True)
        ]


def _count(
    model: nn.Module, sample: Tensor, dense_params: int | None, params: int | None, device: torch.device
) -> Measurement:
    """What is known of a model without timing it."""
    params = count_params(model) if params is None else params
    dense_params = params if dense_params is None else dense_params
    return Measurement(
        density=params / dense_params if dense_params else 1.0,
        params=params,
        size_bytes=len(to_bytes(model.state_dict())),
        macs=count_macs(model, sample),
        device="cpu" if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}",
    )


def count_params(model: nn.Module) -> int:
    """Parameters of a model, zeros included; one that is used twice counts once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulate operations of one sample's forward pass in eval mode.

    Counted are convolutions, matrix products, attention and recurrent layers, as modules or functions. Not
    counted is what does not multiply and add in pairs: normalization, pooling, activations.

    Args:
        model: Any model; its mode is left as it was.
        example_input: A batch of shape ``(n, ...)``; its first sample is used.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), _op_by_op(), counter:
        model(example_input[:1].to(device_of(model)))
    return counter.get_total_flops() // 2


@contextmanager
def _op_by_op() -> Iterator[None]:
    """Turns fused kernels off: those of attention and LSTMs hide their matrix products from the counter."""
    mha = torch.backends.mha
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    fast_attention, enabled = mha.get_fastpath_enabled(), [library.enabled for library in libraries]
    mha.set_fastpath_enabled(False)
    for library in libraries:  # not their flags(), which set precisions as well and warn about it
        library.enabled = False
    try:
        yield
    finally:
        mha.set_fastpath_enabled(fast_attention)
        for library, was in zip(libraries, enabled, strict=True):
            library.enabled = was


def _checked(device: str | torch.device) -> torch.device:
    """The device, with its index when it is a CUDA device."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r}; measuring works on 'cpu' and 'cuda'")
    n_gpus = torch.cuda.device_count()
    if device.index is None and n_gpus:
        return torch.device("cuda", torch.cuda.current_device())
    if (device.index or 0) >= n_gpus:
        raise ValueError(f"device={str(device)!r}, but torch sees {n_gpus} CUDA devices here; use 'cpu'")
    return device


def _batch(sample: Tensor, n: int, device: torch.device) -> Tensor:
    return sample.to(device).repeat(n, *[1] * (sample.dim() - 1))


def _latencies(models: Sequence[nn.Module], x: Tensor, budget_s: float) -> list[Latency]:
    """Times one batch through each model in turn, A B A B ..., until every median is known."""
    for model in models:
        for _ in range(3):
            _timed_ms(model, x)
    times_ms: list[list[float]] = [[] for _ in models]
    start, budget_s = time.perf_counter(), budget_s * len(models)
    spent_s = 0.0
    while len(times_ms[0]) < MIN_REPEATS or spent_s < budget_s:
        for model, times in zip(models, times_ms, strict=True):
            times.append(_timed_ms(model, x))
        spent_s = time.perf_counter() - start
        progress.report(min(1.0, len(times_ms[0]) / MIN_REPEATS, spent_s / budget_s))
        # A few passes in a row agree with each other more than with the next second's: not before a quarter.
        enough = spent_s > budget_s / 4 and len(times_ms[0]) >= MIN_REPEATS
        if enough and all(map(_median_is_known, times_ms)):
            break
    return [
        Latency(len(x), float(np.median(times)), float(np.percentile(times, 95)), len(times)) for times in times_ms
    ]


def _timed_ms(model: nn.Module, x: Tensor) -> float:
    """Milliseconds of one forward pass: by the wall clock on a CPU, by the device's own events on a GPU."""
    if x.device.type == "cpu":
        start = time.perf_counter()
        model(x)
        return 1e3 * (time.perf_counter() - start)
    stream = torch.cuda.current_stream(x.device)
    timer: Callable[..., torch.cuda.Event] = torch.cuda.Event  # whose constructor has no types
    begin, end = timer(enable_timing=True), timer(enable_timing=True)
    stream.record_event(begin)
    model(x)
    stream.record_event(end)
    end.synchronize()
    return float(begin.elapsed_time(end))


def _median_is_known(times: Sequence[float]) -> bool:
    """Whether the median's 95% confidence interval, from order statistics, is narrow enough.

    Of n sorted times, those of rank n/2 ± 0.98 √n enclose the median with that confidence.
    """
    n, half = len(times), 0.98 * math.sqrt(len(times))
    ranked = np.sort(times)
    low, high = ranked[max(math.floor(n / 2 - half), 0)], ranked[min(math.ceil(n / 2 + half), n - 1)]
    return bool(high - low <= 2 * MEDIAN_PRECISION * np.median(ranked))


def _with_resources(measurement: Measurement, model: nn.Module, x: Tensor) -> Measurement:
    """Adds memory and, on a GPU, what NVML saw while the model ran for some seconds."""
    weights_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    if x.device.type == "cpu":
        return replace(measurement, peak_memory_bytes=weights_bytes + _peak_bytes_cpu(model, x))
    peak_bytes = _peak_bytes_cuda(model, x)
    passes = 0
    with GpuWindow(x.device) as window:
        end = time.perf_counter() + ENERGY_WINDOW_S
        while time.perf_counter() < end:
            model(x)
            torch.cuda.synchronize(x.device)
            passes += 1
    usage = window.usage
    return replace(
        measurement,
        peak_memory_bytes=weights_bytes + peak_bytes,
        gpu_memory_bytes=usage.memory_bytes,
        gpu_utilization_pct=usage.utilization_pct,
        gpu_power_w=usage.power_w,
        energy_j=None if usage.energy_j is None else usage.energy_j / (passes * len(x)),
    )


def _peak_bytes_cuda(model: nn.Module, x: Tensor) -> int:
    """The most that one forward pass allocated at once, beside what was there before."""
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    model(x)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


def _peak_bytes_cpu(model: nn.Module, x: Tensor) -> int:
    """The same on the CPU: the peak of the running sum of the allocator's events."""
    with _quiet_kineto(), profile(profile_memory=True) as record:
        model(x)
    assert record.kineto_results is not None, "the profiler has ended"
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events), default=0)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keeps the profiler's library from writing its own log to stderr; it reads the level at first use."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "6"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
