"""How much arithmetic a forward pass takes."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective(unit="MACs")
def macs(measurement: Measurement) -> float:
    """Multiply-accumulate operations of one sample's forward pass."""
    return measurement.macs
