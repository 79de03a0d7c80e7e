"""The NVML window behind measurement.py: what NVIDIA's driver saw of a GPU while a block of code ran.

Everything is optional. A driver, a container or a GPU may lack any of the numbers; each that is lacking is
None and costs none of the others. Without a GPU the window is empty.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from threading import Event, Thread
from typing import Any, TypeVar

import torch

SAMPLE_EVERY_S = 0.1
MAX_SAMPLES = 512  # of a window; a longer one is sampled half as often, again and again
# The energy counter moves every 20 to 100 ms: over less than this its steps would show.
MIN_ENERGY_WINDOW_S = 1.0
# Bits of the driver's answer to why clocks are below what they could be; an idle GPU is not throttled, nor is one
# whose clocks somebody has set.
THROTTLING = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "temperature (hardware)",
    "SwThermalSlowdown": "temperature (driver)",
    "HwPowerBrakeSlowdown": "power brake",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """One reading of a GPU; None for what the driver does not tell.

    Attributes:
        seconds: Since the window began.
        used_bytes: Memory in use on the whole GPU.
        free_bytes: What is free of it.
        process_bytes: What this process held.
        utilization_pct: Share of the last moments, a sixth of a second to one, in which a kernel was resident.
        power_w: Power draw.
        clock_mhz: Clock of the multiprocessors.
        throttled: Why clocks are held back, by the names of `THROTTLING`.
    """

    seconds: float
    used_bytes: int | None = None
    free_bytes: int | None = None
    process_bytes: int | None = None
    utilization_pct: float | None = None
    power_w: float | None = None
    clock_mhz: float | None = None
    throttled: tuple[str, ...] | None = None


@dataclass(frozen=True)
class GpuUsage:
    """What a window saw; empty without a GPU.

    Attributes:
        timeline: The readings, evenly spaced in time.
        energy_j: Energy drawn by the whole GPU during the window, if it lasted a second or more; None where the
            driver does not count it.
    """

    timeline: tuple[Moment, ...] = ()
    energy_j: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The most memory in use on the whole GPU."""
        return max(self._known("used_bytes"), default=None)

    @property
    def free_bytes(self) -> int | None:
        """The least memory that was free on it."""
        return min(self._known("free_bytes"), default=None)

    @property
    def process_memory_bytes(self) -> int | None:
        """The most memory that this process held on it."""
        return max(self._known("process_bytes"), default=None)

    @property
    def utilization_pct(self) -> float | None:
        """Mean share of the time in which a kernel was resident."""
        return _mean(self._known("utilization_pct"))

    @property
    def power_w(self) -> float | None:
        """Mean power draw."""
        return _mean(self._known("power_w"))

    @property
    def clock_mhz(self) -> float | None:
        """Mean clock of the multiprocessors."""
        return _mean(self._known("clock_mhz"))

    @property
    def throttled(self) -> tuple[str, ...] | None:
        """Why clocks were held back at any moment of the window; empty when they were not."""
        known = list(self._known("throttled"))
        return tuple(sorted({reason for reasons in known for reason in reasons})) if known else None

    def _known(self, name: str) -> Iterable[Any]:
        return (value for moment in self.timeline if (value := getattr(moment, name)) is not None)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


class GpuWindow:
    """Watches a GPU during a ``with`` block; `usage` holds what was seen once the block is over.

    Args:
        device: The device the block computes on. For other than CUDA devices `usage` is empty.
        nvml: The NVML binding; the module ``pynvml`` by default.
        every_s: Seconds from one reading to the next; more in a long window, see `MAX_SAMPLES`.
    """

    def __init__(self, device: torch.device, nvml: Any = None, every_s: float = SAMPLE_EVERY_S) -> None:
        self.usage = GpuUsage()
        self._every_s = every_s
        self._device = device
        self._nvml = nvml
        self._gpu: Any = None

    def __enter__(self) -> "GpuWindow":
        uuid = _uuid(self._device)
        if uuid is None:
            return self
        if self._nvml is None:
            import pynvml

            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:  # no driver
            return self
        self._gpu = self._handle(uuid)
        if self._gpu is None:
            self._nvml.nvmlShutdown()
            return self
        self._timeline: list[Moment] = []
        self._over = Event()
        self._thread = Thread(target=self._sample_until_over, name="autocompress-gpu", daemon=True)
        self._energy_at_start_mj = self._energy_mj()
        self._start_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu is None:
            return
        energy_mj, seconds = self._energy_mj(), time.monotonic() - self._start_s
        self._over.set()
        self._thread.join()
        self._nvml.nvmlShutdown()
        self._gpu = None
        energy_j = None
        if energy_mj is not None and self._energy_at_start_mj is not None and seconds >= MIN_ENERGY_WINDOW_S:
            energy_j = (energy_mj - self._energy_at_start_mj) / 1e3
        self.usage = GpuUsage(tuple(self._timeline), energy_j)

    def _handle(self, uuid: str) -> Any:
        """By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, but not NVML's.

        A slice of a GPU (MIG) has a UUID and memory of its own; NVML does not tell its utilization or power.
        """
        names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
        found = (self._read(functools.partial(self._nvml.nvmlDeviceGetHandleByUUID, name)) for name in names)
        return next((handle for handle in found if handle is not None), None)

    def _sample_until_over(self) -> None:
        over, every_s = False, self._every_s
        while not over:  # the last sample is taken as the block ends, so that a short one has one too
            over = self._over.wait(every_s)
            self._timeline.append(self._sample())
            if len(self._timeline) == MAX_SAMPLES:
                self._timeline, every_s = self._timeline[1::2], 2 * every_s

    def _sample(self) -> Moment:
        nvml, gpu = self._nvml, self._gpu
        memory = self._read(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
        percent = self._read(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        milliwatts = self._read(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
        processes = self._read(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(gpu)) or ()
        ours = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory is not None]
        return Moment(
            seconds=time.monotonic() - self._start_s,
            used_bytes=memory.used if memory is not None else None,
            free_bytes=memory.free if memory is not None else None,
            process_bytes=sum(ours) if ours else None,
            utilization_pct=percent,
            power_w=milliwatts / 1e3 if milliwatts is not None else None,
            clock_mhz=self._read(lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            throttled=self._read(self._throttling),
        )

    def _throttling(self) -> tuple[str, ...]:
        bits = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
        masks = {said: getattr(self._nvml, f"nvmlClocksThrottleReason{name}") for name, said in THROTTLING.items()}
        return tuple(said for said, mask in masks.items() if bits & mask)

    def _energy_mj(self) -> int | None:
        return self._read(lambda: int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)))

    def _read(self, call: Callable[[], T]) -> T | None:
        """What one NVML call returns; None where the GPU, the driver or the binding does not support it."""
        try:
            return call()
        except (self._nvml.NVMLError, AttributeError):
            return None


def _uuid(device: torch.device) -> str | None:
    """The UUID of a CUDA device; None for any other, and where there is no CUDA."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(device).uuid)
