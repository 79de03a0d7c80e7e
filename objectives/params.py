"""How many parameters are left, as a count."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective(unit="parameters")
def params(measurement: Measurement) -> float:
    """Parameters kept."""
    return measurement.params
