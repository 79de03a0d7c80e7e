"""How long a forward pass takes, on the device it was measured on."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective(unit="ms")
def latency(measurement: Measurement) -> float | None:
    """Median time of one forward pass at the smallest batch measured, in milliseconds."""
    return measurement.latency_ms
