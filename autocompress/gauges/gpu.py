"""Memory, utilization, power and energy of an NVIDIA GPU during a block of code, as reported by NVML.

Everything is optional. A driver, a container or a GPU may lack any of the numbers; a missing one is None and does
not affect the others. Without a GPU there are none.
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
MAX_SAMPLES = 512  # of a window; whenever there are as many, every other one is dropped and the interval doubles
# The energy counter is updated every 20 to 100 ms: shorter windows would be too coarse.
MIN_ENERGY_WINDOW_S = 1.0
# The driver's reasons for lower clocks that count as throttling. An idle GPU is not throttled, nor is one whose
# clocks were set by a user.
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
    """One reading of a GPU; None for numbers that the driver does not report.

    Attributes:
        seconds: Time since the window began.
        used_bytes: Memory in use on the whole GPU.
        free_bytes: Free memory on the whole GPU.
        process_bytes: Memory in use by this process.
        utilization_pct: Share of the last sixth of a second to second in which a kernel was resident.
        power_w: Power draw.
        clock_mhz: Clock of the multiprocessors.
        throttled: The reasons for throttling, as worded in `THROTTLING`.
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
    """The readings of a window; empty without a GPU.

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
        """The least memory that was free on the whole GPU."""
        return min(self._known("free_bytes"), default=None)

    @property
    def process_memory_bytes(self) -> int | None:
        """The most memory in use by this process."""
        return max(self._known("process_bytes"), default=None)

    @property
    def utilization_pct(self) -> float | None:
        """Mean share of the time in which a kernel was resident, in percent."""
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
        """The reasons for throttling at any moment of the window; empty when there was none."""
        known = list(self._known("throttled"))
        return tuple(sorted({reason for reasons in known for reason in reasons})) if known else None

    def _known(self, name: str) -> Iterable[Any]:
        return (value for moment in self.timeline if (value := getattr(moment, name)) is not None)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return fmean(values) if values else None


class GpuWindow:
    """Samples a GPU in a thread during a ``with`` block; `usage` holds the readings after the block.

    Args:
        device: The device the block computes on. For other than CUDA devices `usage` is empty.
        nvml: The NVML binding; the module ``pynvml`` by default.
        every_s: Seconds between two readings; more in a long window, see `MAX_SAMPLES`.
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
        """NVML's handle of the GPU: by UUID, as CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.

        A slice of a GPU (MIG) has a UUID and memory of its own; NVML does not report its utilization or power.
        """
        names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
        found = (self._read(functools.partial(self._nvml.nvmlDeviceGetHandleByUUID, name)) for name in names)
        return next((handle for handle in found if handle is not None), None)

    def _sample_until_over(self) -> None:
        over, every_s = False, self._every_s
        while not over:  # the last sample is taken at the end of the block: even a short one has a sample
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
        masks = {text: getattr(self._nvml, f"nvmlClocksThrottleReason{name}") for name, text in THROTTLING.items()}
        return tuple(text for text, mask in masks.items() if bits & mask)

    def _energy_mj(self) -> int | None:
        return self._read(lambda: int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)))

    def _read(self, call: Callable[[], T]) -> T | None:
        """The result of an NVML call; None if the GPU, the driver or the binding does not support it."""
        try:
            return call()
        except (self._nvml.NVMLError, AttributeError):
            return None


def _uuid(device: torch.device) -> str | None:
    """The UUID of a CUDA device; None for other devices, or without CUDA."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(device).uuid)
