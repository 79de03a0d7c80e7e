"""The NVML window behind measurement.py: what NVIDIA's driver saw of a GPU while a block of code ran.

Everything is optional. A driver, a container or a GPU may lack any of the numbers; each that is lacking is
None and costs none of the others. Without a GPU the window is empty.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from threading import Event, Thread
from typing import Any, TypeVar

import torch

SAMPLE_EVERY_S = 0.1
# The energy counter moves every 20 to 100 ms: over less than this its steps would show.
MIN_ENERGY_WINDOW_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """One reading of a GPU.

    Attributes:
        seconds: Since the window began.
        free_bytes: Memory that nobody uses on the whole GPU.
        utilization_pct: Share of the driver's last sampling period in which a kernel was resident.
    """

    seconds: float
    free_bytes: int | None
    utilization_pct: float | None


@dataclass(frozen=True)
class GpuUsage:
    """What a window saw; None for what the driver does not tell.

    Attributes:
        memory_bytes: The most memory in use on the whole GPU.
        process_memory_bytes: The most memory that this process held on it.
        utilization_pct: Mean share of the time in which a kernel was resident.
        power_w: Mean power draw.
        energy_j: Energy drawn by the whole GPU during the window, if it lasted a second or more.
        samples: Readings behind the maxima and means.
        timeline: Memory and utilization, reading by reading.
    """

    memory_bytes: int | None = None
    process_memory_bytes: int | None = None
    utilization_pct: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    samples: int | None = None
    timeline: tuple[Moment, ...] = ()


@dataclass
class _Readings:
    memory_bytes: list[int] = field(default_factory=list)
    process_memory_bytes: list[int] = field(default_factory=list)
    utilization_pct: list[float] = field(default_factory=list)
    power_w: list[float] = field(default_factory=list)
    samples: int = 0
    timeline: list[Moment] = field(default_factory=list)


class GpuWindow:
    """Watches a GPU during a ``with`` block; `usage` holds what was seen once the block is over.

    Args:
        device: The device the block computes on. For other than CUDA devices all of `usage` is None.
        nvml: The NVML binding; the module ``pynvml`` by default.
        every_s: Seconds from one reading to the next.
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
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, but not NVML's.
        self._gpu = self._read(lambda: self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        if self._gpu is None:
            self._nvml.nvmlShutdown()
            return self
        self._readings = _Readings()
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
        seen = self._readings
        self.usage = GpuUsage(
            memory_bytes=max(seen.memory_bytes, default=None),
            process_memory_bytes=max(seen.process_memory_bytes, default=None),
            utilization_pct=fmean(seen.utilization_pct) if seen.utilization_pct else None,
            power_w=fmean(seen.power_w) if seen.power_w else None,
            energy_j=energy_j,
            samples=seen.samples,
            timeline=tuple(seen.timeline),
        )

    def _sample_until_over(self) -> None:
        over = False
        while not over:  # the last sample is taken as the block ends, so that a short one has one too
            over = self._over.wait(self._every_s)
            self._sample()

    def _sample(self) -> None:
        nvml, gpu, seen = self._nvml, self._gpu, self._readings
        seen.samples += 1
        if (memory := self._read(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))) is not None:
            seen.memory_bytes.append(memory.used)
        if (percent := self._read(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)) is not None:
            seen.utilization_pct.append(percent)
        seconds = time.monotonic() - self._start_s
        seen.timeline.append(Moment(seconds, None if memory is None else memory.free, percent))
        if (milliwatts := self._read(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))) is not None:
            seen.power_w.append(milliwatts / 1e3)
        processes = self._read(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(gpu)) or ()
        seen.process_memory_bytes += [
            p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory is not None
        ]

    def _energy_mj(self) -> int | None:
        return self._read(lambda: int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)))

    def _read(self, call: Callable[[], T]) -> T | None:
        """What one NVML call returns; None where it is not supported."""
        try:
            return call()
        except self._nvml.NVMLError:
            return None


def _uuid(device: torch.device) -> str | None:
    """The UUID of a CUDA device; None for any other, and where there is no CUDA."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(device).uuid)
