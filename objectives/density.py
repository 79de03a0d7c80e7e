"""How many parameters are left."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective()
def density(measurement: Measurement) -> float:
    """Parameters kept, as a share of the dense model's."""
    return measurement.density
