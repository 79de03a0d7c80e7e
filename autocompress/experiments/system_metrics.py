"""Samples the machine's load while a study runs, under the names of MLflow's own system metrics."""

import time
from collections.abc import Callable, Mapping
from threading import Event, Thread

import psutil
import torch

from autocompress.gauges.gpu import GpuWindow

SAMPLE_EVERY_S = 5.0


def system_metrics(device: str | torch.device) -> dict[str, float]:
    """One reading of processor, memory and GPU; metrics that cannot be measured here are left out.

    Args:
        device: The study's device; other GPUs are not read.
    """
    memory, megabyte = psutil.virtual_memory(), 1e6
    with GpuWindow(torch.device(device)) as window:  # takes a sample when it closes
        pass
    gpu, used, free = window.usage, window.usage.memory_bytes, window.usage.free_bytes
    measured = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / megabyte,
        "process_memory_megabytes": psutil.Process().memory_info().rss / megabyte,
        "gpu_utilization_percentage": gpu.utilization_pct,
        "gpu_memory_usage_megabytes": None if used is None else used / megabyte,
        "gpu_memory_free_megabytes": None if free is None else free / megabyte,
        "gpu_power_usage_watts": gpu.power_w,
    }
    return {f"system/{name}": float(value) for name, value in measured.items() if value is not None}


class SystemMonitor:
    """Reads `system_metrics` every few seconds, in its own thread, between `start` and `stop`.

    Args:
        device: The study's device.
        report: Called with each reading, in that thread.
        every_s: Seconds from one reading to the next.
    """

    def __init__(
        self,
        device: str | torch.device,
        report: Callable[[Mapping[str, float]], None],
        every_s: float = SAMPLE_EVERY_S,
    ) -> None:
        self._device, self._report, self._every_s = device, report, every_s
        self._over = Event()
        self._thread = Thread(target=self._watch, name="autocompress-system", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after a last reading."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        psutil.cpu_percent()  # each call measures the load since the call before
        start, over = time.monotonic(), False
        while not over:
            over = self._over.wait(self._every_s)
            if not over or time.monotonic() - start >= 1:  # a load over less than a second is noise
                self._report(system_metrics(self._device))
