"""Measurement: size, arithmetic, latency, memory and energy of a model. A number is measured here or is None."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress import progress
from autocompress.arguments import flag, instance, listing, number, several, takes, text, whole
from autocompress.formats.onnx_export import weight_dtype
from autocompress.formats.weights import to_bytes
from autocompress.gauges.cpu_energy import CpuEnergy
from autocompress.gauges.devices import usable_device
from autocompress.gauges.gpu import GpuWindow
from autocompress.gauges.latency import Latency, time_in_turns
from autocompress.gauges.macs import count_macs, count_params
from autocompress.gauges.memory import peak_bytes
from autocompress.gauges.runtimes import CannotRun, Run, Runtime, check_runtime, prepare
from autocompress.networks.deployed import deployed, is_channels_last
from autocompress.task import device_of, evaluating

ENERGY_WINDOW_S = 2.0  # many updates of a GPU's energy counter, which come every 20 to 100 ms


@dataclass(frozen=True)
class Measurement:
    """The costs of a model; a field that was not or cannot be measured is None.

    Density, parameters, bytes and MACs are counted on the model as it is. Everything else is measured on the form
    in which it is deployed, with BatchNorm folded and channels last, see
    `autocompress.networks.deployed.deployed`.

    Attributes:
        density: Parameters kept over parameters of the dense model.
        params: Number of parameters kept.
        size_bytes: Size of the saved weights.
        macs: Multiply-accumulate operations of one sample's forward pass.
        device: The device of the measurement, e.g. ``"cpu"`` or ``"cuda:0 NVIDIA H200"``.
        latency: Per runtime and batch size: those of ``runtime`` first, smallest batch first; empty if the model
            was not timed.
        peak_memory_bytes: Weights plus ``activation_memory_bytes``.
        gpu_memory_bytes: Memory in use on the whole GPU (NVML).
        gpu_utilization_pct: Percentage of the time in which a kernel ran (NVML).
        gpu_power_w: Mean power while the model ran (NVML).
        energy_j: Energy of one sample's inference at the largest batch: from NVML's energy counter on a GPU, from
            the RAPL counters of the processor packages on a CPU whose counters can be read.
        activation_memory_bytes: Peak of the memory allocated in one forward pass at the largest batch, without its
            input.
        gpu_process_memory_bytes: GPU memory held by this process (NVML).
        gpu_clock_mhz: Mean clock of the multiprocessors while the model ran (NVML).
        gpu_throttled: The reasons for which the GPU lowered its clocks while the model ran, if any (NVML).
        runtime: The runtime of `latency_ms` and `throughput_per_s`, see `autocompress.gauges.runtimes.RUNTIMES`.
        dtype: Type of the weights, such as ``"float32"``; like the next two None if the model was not timed.
        memory_format: ``"channels_last"`` or ``"contiguous"``.
        threads: Number of torch's CPU threads.
        not_run: The reason for each requested runtime that could not run the model.
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
    activation_memory_bytes: int | None = None
    gpu_process_memory_bytes: int | None = None
    gpu_clock_mhz: float | None = None
    gpu_throttled: tuple[str, ...] | None = None
    runtime: Runtime = "eager"
    dtype: str | None = None
    memory_format: str | None = None
    threads: int | None = None
    not_run: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Measurement":
        """A measurement from its fields as stored on disk; unknown fields are ignored."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        values["latency"] = tuple(Latency(**latency) for latency in record.get("latency", ()))
        if values.get("gpu_throttled") is not None:
            values["gpu_throttled"] = tuple(values["gpu_throttled"])
        return cls(**values)

    @property
    def own_latency(self) -> tuple[Latency, ...]:
        """Its latencies in ``runtime``, smallest batch first."""
        return tuple(latency for latency in self.latency if latency.runtime == self.runtime)

    @property
    def latency_ms(self) -> float | None:
        """Median time of one forward pass in ``runtime`` at the smallest batch measured (1 by default)."""
        return self.own_latency[0].p50_ms if self.own_latency else None

    @property
    def throughput_per_s(self) -> float | None:
        """Samples a second in ``runtime`` at the largest batch measured (32 by default)."""
        return self.own_latency[-1].throughput_per_s if self.own_latency else None

    @property
    def noise(self) -> float:
        """The widest confidence interval of its latencies in ``runtime``, relative; 0 if it was not timed."""
        return max((latency.interval or 0.0 for latency in self.own_latency), default=0.0)


_TAKES = {
    "example_input": instance("a tensor", Tensor),
    "dense_params": whole,
    "batch_sizes": several(whole),
    "timing": flag,
    "budget_s": number,
    "runtimes": several(text),
}


@takes(model=instance("a torch.nn.Module", nn.Module), params=whole, **_TAKES)
def measure(
    model: nn.Module,
    example_input: Tensor,
    device: str | torch.device = "cpu",
    *,
    dense_params: int | None = None,
    params: int | None = None,
    batch_sizes: int | Sequence[int] = (1, 32),
    timing: bool = True,
    budget_s: float = 0.6,
    runtimes: str | Sequence[str] = ("eager",),
) -> Measurement:
    """Measures one model, see `compare`.

    A module does not know the dense model that it comes from: without ``dense_params`` its density is 1, and
    without ``params`` the zero weights that ``Prune`` leaves are counted as parameters. In ``result.model``
    BatchNorm is folded, in the module of `autocompress.load` it is not. This measures the same as
    ``result.measurements["compressed"]``::

        dense, kept = (result.measurements[name].params for name in ("dense", "compressed"))
        model = ac.load(result.folder / "best", task.model)
        ac.measure(model, task.example_input, dense_params=dense, params=kept)
    """
    return compare(
        [model],
        example_input,
        device,
        dense_params=dense_params,
        params=[params],
        batch_sizes=batch_sizes,
        timing=timing,
        budget_s=budget_s,
        runtimes=runtimes,
    )[0]


@takes(models=several(instance("a torch.nn.Module", nn.Module)), **_TAKES)
def compare(
    models: Sequence[nn.Module],
    example_input: Tensor,
    device: str | torch.device = "cpu",
    *,
    dense_params: int | None = None,
    params: Sequence[int | None] | None = None,
    batch_sizes: int | Sequence[int] = (1, 32),
    timing: bool = True,
    budget_s: float = 0.6,
    runtimes: str | Sequence[str] = ("eager",),
    onnx_files: Sequence[Path | None] | None = None,
) -> list[Measurement]:
    """Measures several models. Their forward passes are timed in turns, so that drift affects all of them alike.

    Args:
        models: Models of float32 batches; their modes, devices and weights are left unchanged.
        example_input: A batch of shape ``(n, ...)``; the first sample is used.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        dense_params: Number of the dense model's parameters, for the density; by default each model's ``params``.
        params: Number of parameters kept, per model; by default all that the model holds, including zeros.
        batch_sizes: Samples per forward pass, for latency; memory and energy are measured at the largest.
        timing: Whether to measure latency, memory, power and energy, or only to count.
        budget_s: Seconds per model, runtime and batch size after which timing ends, once there are 20 repeats.
        runtimes: The runtimes to time, see `autocompress.gauges.runtimes.RUNTIMES`; objectives see the first. A
            runtime that cannot run a model is named in `Measurement.not_run`.
        onnx_files: Per model, the exported ONNX file that ships, or None; ONNX Runtime runs it if given.

    Raises:
        ValueError: If the device or a runtime is not available, or an argument is not usable.
    """
    device = _checked(device)
    batch_sizes, runtimes = listing(batch_sizes), listing(runtimes)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes={batch_sizes}; give one or more positive numbers of samples")
    if not runtimes:
        raise ValueError("runtimes=(); give one or more runtimes")
    if not 0 <= budget_s < math.inf:
        raise ValueError(f"budget_s={budget_s}; it must be at least 0, and finite")
    if not example_input.ndim or not len(example_input):
        raise ValueError(f"example_input= is of shape {tuple(example_input.shape)}; it must hold a sample or more")
    kept = params or [None] * len(models)
    for name, n in (("dense_params", dense_params), *(("params", n) for n in kept)):
        if n is not None and n < 0:
            raise ValueError(f"{name}={n}; it must be at least 0")
    checked_runtimes = [check_runtime(name, device) for name in dict.fromkeys(runtimes)]
    sample = example_input[:1].detach()
    results = [_count(m, sample, dense_params, n, device) for m, n in zip(models, kept, strict=True)]
    if not timing:
        return [replace(result, runtime=checked_runtimes[0]) for result in results]
    on_device = [m if device_of(m) == device else copy.deepcopy(m).to(device) for m in models]
    deployables = [deployed(model, sample) for model in on_device]
    batches = [_batch(sample, n, device) for n in sorted(set(batch_sizes))]
    with ExitStack() as modes:
        for model in deployables:
            modes.enter_context(evaluating(model))
        files = onnx_files or [None] * len(models)
        latencies, reasons = _latencies(deployables, files, batches, checked_runtimes, budget_s)
        with torch.inference_mode():
            return [
                _with_resources(
                    replace(
                        result,
                        latency=tuple(latency),
                        runtime=checked_runtimes[0],
                        dtype=str(weight_dtype(model)).removeprefix("torch."),
                        memory_format="channels_last" if is_channels_last(model) else "contiguous",
                        threads=torch.get_num_threads(),
                        not_run=reason,
                    ),
                    model,
                    batches[-1],
                )
                for result, latency, reason, model in zip(results, latencies, reasons, deployables, strict=True)
            ]


def _latencies(
    models: Sequence[nn.Module],
    onnx_files: Sequence[Path | None],
    batches: Sequence[Tensor],
    runtimes: Sequence[Runtime],
    budget_s: float,
) -> tuple[list[list[Latency]], list[dict[str, str]]]:
    """Times models in turns.

    Returns:
        For each model its latencies in every runtime that can run it, and by runtime the reasons of those that
        cannot.
    """
    latencies: list[list[Latency]] = [[] for _ in models]
    reasons: list[dict[str, str]] = [{} for _ in models]
    for nth, runtime in enumerate(runtimes):
        runs: dict[int, Run] = {}
        for i, (model, file) in enumerate(zip(models, onnx_files, strict=True)):
            try:
                runs[i] = prepare(runtime, model, batches[0], file)
            except CannotRun as error:
                reasons[i][runtime] = str(error)
        if runs:
            with torch.inference_mode(), progress.span(nth / len(runtimes), (nth + 1) / len(runtimes)):
                timed = time_in_turns(list(runs.values()), batches, budget_s, runtime)
            for i, model_latencies in zip(runs, timed, strict=True):
                latencies[i] += model_latencies
    return latencies, reasons


def _count(
    model: nn.Module, sample: Tensor, dense_params: int | None, params: int | None, device: torch.device
) -> Measurement:
    """The measurement of a model with its counts only."""
    try:
        macs = count_macs(model, sample)
    except Exception as error:  # whatever a model may raise that is not made for this input
        if "memory" in str(error):  # a trial retries with smaller batches
            raise
        shape, reason = tuple(sample.shape), f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"the model does not take example_input=, of shape {shape}: {reason}") from error
    params = count_params(model) if params is None else params
    dense_params = params if dense_params is None else dense_params
    return Measurement(
        density=params / dense_params if dense_params else 1.0,
        params=params,
        size_bytes=len(to_bytes(model.state_dict())),
        macs=macs,
        device="cpu" if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}",
    )


def _checked(device: str | torch.device) -> torch.device:
    """The device, with its index when it is a CUDA device."""
    device = torch.device(usable_device(device))
    if device.type == "cpu":
        return torch.device("cpu")
    n_gpus = torch.cuda.device_count()
    if device.index is None and n_gpus:
        return torch.device("cuda", torch.cuda.current_device())
    if (device.index or 0) >= n_gpus:
        raise ValueError(f"device={str(device)!r}, but torch sees {n_gpus} CUDA devices here; use 'cpu'")
    return device


def _batch(sample: Tensor, n: int, device: torch.device) -> Tensor:
    """The sample ``n`` times, as a batch on the device."""
    return sample.to(device).repeat(n, *[1] * (sample.dim() - 1))


def _with_resources(measurement: Measurement, model: nn.Module, x: Tensor) -> Measurement:
    """Adds memory, energy if there is a counter and, on a GPU, NVML's readings while the model runs."""
    activations = peak_bytes(model, x)
    weights_bytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    measurement = replace(
        measurement, peak_memory_bytes=weights_bytes + activations, activation_memory_bytes=activations
    )
    if x.device.type == "cpu":
        with CpuEnergy() as counter:
            passes = _run_for(model, x, ENERGY_WINDOW_S) if counter.is_there else 0
        energy_j = counter.energy_j
        return replace(measurement, energy_j=None if energy_j is None else energy_j / (passes * len(x)))
    with GpuWindow(x.device) as window:
        passes = _run_for(model, x, ENERGY_WINDOW_S)
    usage = window.usage
    return replace(
        measurement,
        gpu_memory_bytes=usage.memory_bytes,
        gpu_process_memory_bytes=usage.process_memory_bytes,
        gpu_utilization_pct=usage.utilization_pct,
        gpu_power_w=usage.power_w,
        gpu_clock_mhz=usage.clock_mhz,
        gpu_throttled=usage.throttled,
        energy_j=None if usage.energy_j is None else usage.energy_j / (passes * len(x)),
    )


def _run_for(run: Callable[[Tensor], object], x: Tensor, seconds: float) -> int:
    """Runs the model repeatedly, for some seconds but at least once; returns the number of passes."""
    passes, end = 0, time.perf_counter() + seconds
    while passes == 0 or time.perf_counter() < end:
        run(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        passes += 1
    return passes
