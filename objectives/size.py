"""How large the file of the weights is."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective(unit="bytes")
def size(measurement: Measurement) -> float:
    """The saved weights on disk, in bytes."""
    return measurement.size_bytes
