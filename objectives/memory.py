"""How much memory it takes to run the model."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective(unit="bytes")
def memory(measurement: Measurement) -> float | None:
    """Weights and activations that a forward pass at the largest batch holds at once, in bytes."""
    return measurement.peak_memory_bytes
