"""Measurement: what a model costs. Every number is measured here or absent."""

from dataclasses import dataclass


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
        peak_memory_bytes: Weights and the most that one forward pass at the largest batch held at once.
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

    @property
    def latency_ms(self) -> float | None:
        """Median time of one forward pass at the smallest batch measured (1 by default)."""
        return self.latency[0].p50_ms if self.latency else None

    @property
    def throughput_per_s(self) -> float | None:
        """Samples a second at the largest batch measured (32 by default)."""
        return 1e3 * self.latency[-1].batch / self.latency[-1].p50_ms if self.latency else None
