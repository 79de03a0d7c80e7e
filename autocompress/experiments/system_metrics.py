"""What a study does to its machine as it goes, under the names by which MLflow's own monitor knows it."""

import time
from collections.abc import Callable, Mapping
from threading import Event, Thread

import psutil
import torch

from autocompress.gauges.gpu import GpuWindow

SAMPLE_EVERY_S = 5.0


def system_metrics(device: str | torch.device) -> dict[str, float]:
    """One reading of the processor, the memory and the GPU; what cannot be measured here is left out.

    Args:
        device: Where the study computes; of other GPUs nothing is said.
    """
    memory, megabyte = psutil.virtual_memory(), 1e6
    with GpuWindow(torch.device(device)) as window:  # its last sample is taken as it closes
        pass
    gpu, held, free = window.usage, window.usage.memory_bytes, window.usage.free_bytes
    measured = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_megabytes": memory.used / megabyte,
        "process_memory_megabytes": psutil.Process().memory_info().rss / megabyte,
        "gpu_utilization_percentage": gpu.utilization_pct,
        "gpu_memory_usage_megabytes": None if held is None else held / megabyte,
        "gpu_memory_free_megabytes": None if free is None else free / megabyte,
        "gpu_power_usage_watts": gpu.power_w,
    }
    return {f"system/{name}": float(value) for name, value in measured.items() if value is not None}


class SystemMonitor:
    """Reads `system_metrics` every few seconds, in a thread of its own, between `start` and `stop`.

    Args:
        device: Where the study computes.
        report: Is handed each reading, in that thread.
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
        """Begins to read."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it, with a last reading."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join()

    def _watch(self) -> None:
        psutil.cpu_percent()  # a load is one since the last time that this thread asked for it
        began, over = time.monotonic(), False
        while not over:
            over = self._over.wait(self._every_s)
            # Of less than a second nothing can be said.
            if not over or time.monotonic() - began >= 1:
                self._report(system_metrics(self._device))
