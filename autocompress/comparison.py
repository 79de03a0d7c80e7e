"""Dense beside compressed, as every place that shows a result words it: from what ``result.json`` holds."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Found = Mapping[str, Any]  # the content of a result.json


def comparison(found: Found) -> list[tuple[str, str, str, str]]:
    """Rows of what, dense, compressed and ratio; none when there is no compressed model.

    Args:
        found: What `autocompress.Result.to_json` returned.
    """
    measured, scores = found["measurements"], found["scores"]
    if "compressed" not in measured:
        return []
    dense, compressed = measured["dense"], measured["compressed"]
    rows = []
    for split in ("val", "test"):
        a, b = scores["dense"][split], scores["compressed"][split]
        rows.append((f"score on {split}", f"{a:.4f}", f"{b:.4f}", f"{100 * (b - a):+.2f} pp"))
    for one in found.get("constraints") or ():
        for split in ("val", "test"):
            value, met = one[split]["value"], one["test"]["met"] if split == "test" else one["val"]["excess"] <= 0
            name = re.split(r"[<>]=?", one["constraint"])[0].strip()
            rows.append((f"{name} on {split}", "", f"{value:.4f}", "" if met else "violated"))
    rows.append(("density", f"{dense['density']:.4f}", f"{compressed['density']:.4f}", ""))
    for name, key, show in COSTS:
        costs = dense[key], compressed[key]
        shown = ["n/a" if cost is None else show(cost) for cost in costs]
        rows.append((name, shown[0], shown[1], ratio(*costs)))
    for before, after in zip(dense["latency"], compressed["latency"], strict=True):
        times = [f"{at['p50_ms']:.3f} ms (p95 {at['p95_ms']:.3f})" for at in (before, after)]
        faster = ratio(before["p50_ms"], after["p50_ms"])
        rows.append((f"latency, batch {before['batch']}", times[0], times[1], faster))
    return rows


def classes_that_lost(found: Found) -> list[tuple[str, str, str, str, str]]:
    """Rows of class, samples, recall before and after and its change: where the bound on the drop is exceeded.

    The mean over classes must not hide what becomes of a rare one.
    """
    bound = (found.get("certificate") or {}).get("max_drop")
    rows = []
    for one in found.get("classes") or ():
        before, after = one["dense_recall"], one["recall"]
        if None not in (bound, before, after) and round(before - after, 12) > bound:
            change = f"{100 * (after - before):+.2f} pp"
            rows.append((one["name"], str(one["support"]), f"{before:.4f}", f"{after:.4f}", change))
    return rows


def ratio(dense: float | None, compressed: float | None) -> str:
    """How many times less; nothing where one of the two is absent or zero."""
    return f"{dense / compressed:.2f}x" if dense and compressed else ""


def as_bytes(n: float) -> str:
    """A size in the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if round(n, 1) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def as_count(n: float) -> str:
    """A count in thousands, millions, billions or trillions."""
    for unit in ("", "k", "M", "G"):
        if float(f"{n:.4g}") < 1000:
            return f"{n:.4g}{unit}"
        n /= 1000
    return f"{n:.4g}T"


COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # name, field of a Measurement, how to write it
    ("parameters", "params", lambda n: f"{n:,.0f}"),
    ("weights on disk", "size_bytes", as_bytes),
    ("MACs", "macs", as_count),
    ("peak memory", "peak_memory_bytes", as_bytes),
    ("GPU memory in use", "gpu_memory_bytes", as_bytes),
    ("GPU utilization", "gpu_utilization_pct", lambda x: f"{x:.0f}%"),
    ("GPU power", "gpu_power_w", lambda x: f"{x:.0f} W"),
    ("energy an inference", "energy_j", lambda x: f"{1000 * x:.3f} mJ"),
)
