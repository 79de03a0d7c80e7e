"""The energy that a CPU draws during a block of code, by its RAPL counters where there are any to read."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class CpuEnergy:
    """Reads the processor packages' energy counters around a ``with`` block.

    Linux has a counter for each package, which by default only root may read. The counters include all other
    processes: they measure the machine's processors, as NVML's measures the whole GPU.

    Args:
        powercap: The folder of the counters.

    Attributes:
        is_there: Whether there are counters that can be read.
        energy_j: Energy drawn during the block, in joules; None before its end and without counters.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # Packages are intel-rapl:0, intel-rapl:1 ... (AMD's, too); they include their parts, intel-rapl:0:0.
        self._zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self.energy_j: float | None = None
        self._before = self._read()

    @property
    def is_there(self) -> bool:
        """Whether there are counters that can be read."""
        return self._before is not None

    def __enter__(self) -> "CpuEnergy":
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._read()
        if self._before is None or after is None:
            return
        drawn_uj = 0
        for zone, start, end in zip(self._zones, self._before, after, strict=True):
            # The counter wraps around to 0 at the end of its range.
            drawn_uj += end - start if end >= start else end - start + _number(zone / "max_energy_range_uj")
        self.energy_j = drawn_uj / 1e6

    def _read(self) -> list[int] | None:
        try:
            return [_number(zone / "energy_uj") for zone in self._zones] or None
        except (OSError, ValueError):  # no permission, or a virtual machine's counter that holds no number
            return None


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))
