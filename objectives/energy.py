"""How much energy an inference takes, on machines that count it."""

from autocompress.goal import objective
from autocompress.measurement import Measurement


@objective(unit="mJ")
def energy(measurement: Measurement) -> float | None:
    """Energy of one sample's inference at the largest batch measured, in millijoules."""
    return None if measurement.energy_j is None else 1e3 * measurement.energy_j
