"""Dense beside compressed, as every place that shows a result words it: from what ``result.json`` holds."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]  # the content of a result.json


def comparison(found: Found) -> list[tuple[str, ...]]:
    """Rows of what, dense, compressed and ratio; none when there is no compressed model.

    Args:
        found: What `autocompress.Result.to_json` returned.
    """
    measured, scores = found["measurements"], found["scores"]
    if "compressed" not in measured:
        return []
    rows: list[tuple[str, ...]] = []
    for split in ("val", "test"):
        a, b = scores["dense"][split], scores["compressed"][split]
        rows.append((f"score on {split}", f"{a:.4f}", f"{b:.4f}", f"{100 * (b - a):+.2f} pp"))
    for one in found.get("constraints") or ():
        if one["test"].get("is_cost"):
            value = in_unit(one["test"]["value"], one["test"]["unit"])
            rows.append((one["constraint"], "", value, "" if one["test"]["met"] else "violated"))
            continue
        for split in ("val", "test"):
            value, met = one[split]["value"], one["test"]["met"] if split == "test" else one["val"]["excess"] <= 0
            name = re.split(r"[<>]=?", one["constraint"])[0].strip()
            rows.append((f"{name} on {split}", "", f"{value:.4f}", "" if met else "violated"))
    return rows + costs(measured)


def costs(measured: Found, *, throughput: bool = False) -> list[tuple[str, ...]]:
    """Rows of what, the cost of each model and, of two models, the ratio.

    Args:
        measured: Measurements by model: ``"dense"`` and maybe ``"compressed"``.
        throughput: Whether there are rows of samples a second, too.
    """
    models = list(measured.values())
    rows = [_row("density", [m["density"] for m in models], lambda x: f"{x:.4f}", compare=False)]
    for name, key, show in COSTS:
        values = [m.get(key) for m in models]
        if key in ALWAYS or any(value is not None for value in values):
            rows.append(_row(name, values, show))
        elif key == ON_GPU[-1] and not any(m.get(one) is not None for m in models for one in ON_GPU):
            rows.append(_row("GPU memory, utilization, power", values, show))
    for (runtime, batch), *found in timed(measured):
        ms = [at and at["p50_ms"] for at in found]
        shown = [_time(at) for at in found]
        where = f"{RUNTIMES.get(runtime, runtime)}, batch {batch}"
        rows.append((f"latency, {where}", *shown, *([ratio(*ms)] if len(ms) == 2 else [])))
        if throughput:
            served = [f"{as_count(1e3 * batch / one)}/s" if one else "n/a" for one in ms]
            rows.append((f"samples, {where}", *served, *([ratio(*ms)] if len(ms) == 2 else [])))
    return rows


def _row(name: str, values: Sequence[Any], show: Callable[[Any], str], *, compare: bool = True) -> tuple[str, ...]:
    cells = ["n/a" if value is None else show(value) for value in values]
    return (name, *cells, *([ratio(*values) if compare else ""] if len(values) == 2 else []))


def timed(measured: Found) -> list[tuple[Any, ...]]:
    """Pairs of a runtime and a batch size, each with the latencies of the models there; None where one has none.

    Args:
        measured: Measurements by model: ``"dense"`` and maybe ``"compressed"``.
    """
    found = [{(at.get("runtime", "eager"), at["batch"]): at for at in m["latency"]} for m in measured.values()]
    keys = dict.fromkeys(key for latencies in found for key in latencies)
    return [(key, *(latencies.get(key) for latencies in found)) for key in keys]


def timed_together(measured: Found) -> list[tuple[Any, Any]]:
    """The latencies of the dense and the compressed model in the first runtime that took both."""
    pairs = [(runtime, before, after) for (runtime, _), before, after in timed(measured) if before and after]
    return [(before, after) for runtime, before, after in pairs if runtime == pairs[0][0]]


def _time(at: Mapping[str, Any] | None) -> str:
    if at is None:
        return "n/a"
    interval = f" ± {math.ceil(100 * at['interval'])}%" if at.get("interval") is not None else ""
    return f"{_digits(at['p50_ms'])} ms{interval} (p95 {_digits(at['p95_ms'])})"


def _digits(ms: float) -> str:
    """Milliseconds to the microsecond, of long times to four digits."""
    return f"{ms:.3f}" if ms < 10 else f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}"


def conditions(measured: Found) -> list[str]:
    """How the times were taken, and why some are absent: one sentence each."""
    said = {}
    for who, m in measured.items():
        if m["latency"] and m.get("dtype"):
            threads = f", {m['threads']} thread{'s' * (m['threads'] != 1)}" if m["device"] == "cpu" else ""
            said[who] = f"{m['dtype']}, {m['memory_format']}{threads}, on {m['device']}"
    alike = len(set(said.values())) == 1
    how = list(said.values())[:1] if alike else [f"{words} ({who})" for who, words in said.items()]
    lines = [f"measured in {'; '.join(how)}; medians ± their 95% confidence interval"] if how else []
    for who, m in measured.items():
        lines += [
            f"no time of the {who} model in {RUNTIMES[at]}: {why}" for at, why in m.get("not_run", {}).items()
        ]
    return lines + slower(measured)


def slower(measured: Found) -> list[str]:
    """Where the compressed model takes longer than the dense one beyond the noise: a sentence, or none."""
    found = []
    for (runtime, batch), *pair in timed(measured):
        if len(pair) == 2 and all(at and at.get("interval") is not None for at in pair):
            before, after = pair
            least, most = after["p50_ms"] * (1 - after["interval"]), before["p50_ms"] * (1 + before["interval"])
            if least > most:
                times = f"{_digits(after['p50_ms'])} ms instead of {_digits(before['p50_ms'])} ms"
                found.append(f"in {RUNTIMES.get(runtime, runtime)} at batch {batch} ({times})")
    return [f"slower than the dense model {' and '.join(found)}"] if found else []


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


def in_words(params: Mapping[str, Any]) -> str:
    """What a trial chose beside its density, in a line: ``criterion=l2, lr=0.0312``."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in params.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def constrained(text: str) -> str:
    """What a constraint is about, in words: ``"balanced accuracy"`` of ``"balanced_accuracy>=0.9"``."""
    return re.split("[<>]=", text)[0].replace("_", " ")


def in_unit(value: float, unit: str) -> str:
    """A value in its unit: bytes and counts in multiples of a thousand, scores to four decimals."""
    if unit == "bytes":
        return as_bytes(value)
    if unit in ("MACs", "parameters"):
        return f"{as_count(value)} {unit}"
    return f"{value:.4g} {unit}" if unit else f"{value:.4f}"


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


RUNTIMES = {"eager": "PyTorch", "compile": "torch.compile", "onnxruntime": "ONNX Runtime"}
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # name, field of a Measurement, how to write it
    ("parameters", "params", lambda n: f"{n:,.0f}"),
    ("weights on disk", "size_bytes", as_bytes),
    ("MACs", "macs", as_count),
    ("peak memory", "peak_memory_bytes", as_bytes),
    ("activation memory", "activation_memory_bytes", as_bytes),
    ("GPU memory in use", "gpu_memory_bytes", as_bytes),
    ("GPU memory, this process", "gpu_process_memory_bytes", as_bytes),
    ("GPU utilization", "gpu_utilization_pct", lambda x: f"{x:.0f}%"),
    ("GPU power", "gpu_power_w", lambda x: f"{x:.0f} W"),
    ("GPU clock", "gpu_clock_mhz", lambda x: f"{x:.0f} MHz"),
    ("energy an inference", "energy_j", lambda x: f"{1000 * x:.3f} mJ"),
)
ALWAYS = ("params", "size_bytes", "macs", "peak_memory_bytes", "energy_j")  # the others where a model has them
ON_GPU = ("gpu_memory_bytes", "gpu_utilization_pct", "gpu_power_w")
