"""An objective of your own: a function of a Measurement.

Run it with:                python examples/custom_objective.py
Use it on the command line: autocompress tune --objective examples/custom_objective.py:first_answer_s
"""

import autocompress as ac

BYTES_PER_S = 50_000  # of a slow radio link


@ac.objective(direction="minimize", unit="s")
def first_answer_s(measurement: ac.Measurement) -> float:
    """Seconds to the first prediction: download the weights, run once."""
    assert measurement.latency_ms is not None, "time is measured whenever an objective asks for it"
    return measurement.size_bytes / BYTES_PER_S + measurement.latency_ms / 1e3


if __name__ == "__main__":  # the command line runs this file too, for the objective alone
    result = ac.tune(scheme="StructPrune+Quantize16", objective=first_answer_s, max_drop=0.02, trials=2, epochs=3)
    print(result.sentence)
    for name, measurement in result.measurements.items():
        print(f"{name}: {first_answer_s(measurement):.2f} s to the first answer")
