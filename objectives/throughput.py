"""How many samples are served in a second."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective("maximize", unit="1/s")
def throughput(measurement: Measurement) -> float | None:
    """Samples a second at the largest batch measured, in the runtime that latency is measured in."""
    return measurement.throughput_per_s
