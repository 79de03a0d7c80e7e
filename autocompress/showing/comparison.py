"""The comparison of the dense and the compressed model as rows of text, from the content of ``result.json``."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]  # the content of a result.json


def comparison(found: Found) -> list[tuple[str, ...]]:
    """Rows of quantity, dense, compressed and ratio; none if there is no compressed model.

    Args:
        found: The result of `autocompress.Result.to_json`.
    """
    measured, scores = found["measurements"], found["scores"]
    if "compressed" not in measured:
        return []
    rows: list[tuple[str, ...]] = []
    for split in ("val", "test"):
        a, b = scores["dense"][split], scores["compressed"][split]
        rows.append((f"score on {split}", f"{a:.4f}", f"{b:.4f}", f"{100 * (b - a):+.2f} pp"))
    for constraint in found.get("constraints") or ():
        text, val, test = (constraint[key] for key in ("constraint", "val", "test"))
        if test.get("is_cost"):
            rows.append((text, "", in_unit(test["value"], test["unit"]), "" if test["met"] else "violated"))
            continue
        name = _without_value(text)
        for split, value, met in (("val", val["value"], val["excess"] <= 0), ("test", test["value"], test["met"])):
            before = f"{constraint['dense'][split]:.4f}" if constraint.get("dense") else ""
            rows.append((f"{name} on {split}", before, f"{value:.4f}", "" if met else "violated"))
    return rows + costs(measured)


def costs(measured: Found, *, throughput: bool = False) -> list[tuple[str, ...]]:
    """Rows of quantity, the cost of each model and, if there are two models, the ratio.

    Args:
        measured: Measurements by model: ``"dense"`` and maybe ``"compressed"``.
        throughput: Whether to add rows of samples per second.
    """
    models = list(measured.values())
    rows = [_row("density", [m["density"] for m in models], lambda x: f"{x:.4f}", compare=False)]
    for name, key, show in COSTS:
        values = [m.get(key) for m in models]
        if key in ALWAYS or any(value is not None for value in values):
            rows.append(_row(name, values, show))
        elif key == ON_GPU[-1] and not any(m.get(field) is not None for m in models for field in ON_GPU):
            rows.append(_row("GPU memory, utilization, power", values, show))
    for (runtime, batch), *latencies in timed(measured):
        medians_ms = [latency and latency["p50_ms"] for latency in latencies]
        speedup = [ratio(*medians_ms)] if len(medians_ms) == 2 else []
        where = f"{RUNTIMES.get(runtime, runtime)}, batch {batch}"
        rows.append((f"latency, {where}", *map(_time, latencies), *speedup))
        if throughput:
            per_s = [f"{as_count(1e3 * batch / ms)}/s" if ms else "n/a" for ms in medians_ms]
            rows.append((f"samples, {where}", *per_s, *speedup))
    return rows


def _row(name: str, values: Sequence[Any], show: Callable[[Any], str], *, compare: bool = True) -> tuple[str, ...]:
    cells = ["n/a" if value is None else show(value) for value in values]
    return (name, *cells, *([ratio(*values) if compare else ""] if len(values) == 2 else []))


def timed(measured: Found) -> list[tuple[Any, ...]]:
    """Groups latencies by runtime and batch size.

    Args:
        measured: Measurements by model: ``"dense"`` and maybe ``"compressed"``.

    Returns:
        Tuples of (runtime, batch size) and each model's latency there, or None.
    """
    by_model = [
        {(latency.get("runtime", "eager"), latency["batch"]): latency for latency in m["latency"]}
        for m in measured.values()
    ]
    keys = dict.fromkeys(key for latencies in by_model for key in latencies)
    return [(key, *(latencies.get(key) for latencies in by_model)) for key in keys]


def timed_together(measured: Found) -> list[tuple[Any, Any]]:
    """Pairs of the dense and the compressed model's latency in the first runtime that ran both, by batch size."""
    pairs = [(runtime, before, after) for (runtime, _), before, after in timed(measured) if before and after]
    return [(before, after) for runtime, before, after in pairs if runtime == pairs[0][0]]


def _time(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return "n/a"
    interval = f" ± {math.ceil(100 * latency['interval'])}%" if latency.get("interval") is not None else ""
    return f"{_digits(latency['p50_ms'])} ms{interval} (p95 {_digits(latency['p95_ms'])})"


def _digits(ms: float) -> str:
    """Milliseconds, to the microsecond if short, to four digits if long."""
    return f"{ms:.3f}" if ms < 10 else f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}"


def conditions(measured: Found) -> list[str]:
    """Sentences on how latencies were measured, why some are absent, and where the compressed model is slower."""
    by_model = {}
    for who, m in measured.items():
        if m["latency"] and m.get("dtype"):
            threads = f", {m['threads']} thread{'s' * (m['threads'] != 1)}" if m["device"] == "cpu" else ""
            by_model[who] = f"{m['dtype']}, {m['memory_format']}{threads}, on {m['device']}"
    same = len(set(by_model.values())) == 1
    how = list(by_model.values())[:1] if same else [f"{words} ({who})" for who, words in by_model.items()]
    lines = [f"measured in {'; '.join(how)}; medians ± their 95% confidence interval"] if how else []
    for who, m in measured.items():
        lines += [
            f"no time of the {who} model in {RUNTIMES[runtime]}: {reason}"
            for runtime, reason in m.get("not_run", {}).items()
        ]
    return lines + slower(measured)


def slower(measured: Found) -> list[str]:
    """A sentence on where the compressed model is significantly slower than the dense one, if anywhere."""
    places = []
    for (runtime, batch), *pair in timed(measured):
        if len(pair) == 2 and all(latency and latency.get("interval") is not None for latency in pair):
            before, after = pair
            least, most = after["p50_ms"] * (1 - after["interval"]), before["p50_ms"] * (1 + before["interval"])
            if least > most:
                times = f"{_digits(after['p50_ms'])} ms instead of {_digits(before['p50_ms'])} ms"
                places.append(f"in {RUNTIMES.get(runtime, runtime)} at batch {batch} ({times})")
    return [f"slower than the dense model {' and '.join(places)}"] if places else []


def classes_that_lost(found: Found) -> list[tuple[str, str, str, str, str]]:
    """The classes whose recall drops by more than the bound, which a mean over classes could hide.

    Returns:
        Rows of class, samples, dense recall, recall and change.
    """
    bound = (found.get("certificate") or {}).get("max_drop")
    rows = []
    for of_class in found.get("classes") or ():
        before, after = of_class["dense_recall"], of_class["recall"]
        if None not in (bound, before, after) and round(before - after, 12) > bound:
            change = f"{100 * (after - before):+.2f} pp"
            rows.append((of_class["name"], str(of_class["support"]), f"{before:.4f}", f"{after:.4f}", change))
    return rows


def decisions(found: Found) -> list[tuple[str, ...]]:
    """The decision thresholds, if there are any: a row for each class and model.

    Returns:
        Rows of class, model, metric, probability, and sensitivity and specificity on val, then on test, there with
        the lower bounds of their confidence intervals.
    """
    by_model = found.get("decision_thresholds") or {}
    rows = []
    for pair in zip(*by_model.values(), strict=False):
        for model, at in zip(by_model, pair, strict=True):
            on_val = [_share(at["val"][rate]) for rate in RATES]
            on_test = [_share(at["test"][rate], at["lower"][rate]) for rate in RATES]
            rows.append((at["class_name"], model, at["metric"], f"{at['probability']!r}", *on_val, *on_test))
    return rows


def _share(value: float | None, lower: float | None = None) -> str:
    if value is None:
        return "n/a"
    bound = "" if lower is None else f" (>= {math.floor(1e4 * lower) / 1e4:.4f})"
    return f"{value:.4f}{bound}"


def ratio(dense: float | None, compressed: float | None) -> str:
    """The factor by which the compressed model is smaller or faster; empty if a value is absent or zero."""
    return f"{dense / compressed:.2f}x" if dense and compressed else ""


def in_words(params: Mapping[str, Any]) -> str:
    """The parameters of a trial beside its density, in a line: ``criterion=l2, lr=0.0312``."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in params.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def constrained(text: str) -> str:
    """The quantity that a constraint limits: ``"balanced accuracy"`` of ``"balanced_accuracy>=0.9"``."""
    return spaced(_without_value(text))


def spaced(metric: str) -> str:
    """A metric's name in words: ``"balanced accuracy"``; the class in ``"recall[a_b]"`` stays as it is."""
    kind, bracket, of_class = metric.partition("[")
    return kind.replace("_", " ") + bracket + of_class


def _without_value(text: str) -> str:
    """A constraint up to its last comparison: a class may be named ``size>=2cm``."""
    return re.sub(r"\s*[<>]=(?!.*[<>]=).*", "", text).strip()


RATES = ("sensitivity", "specificity")
COUNTED = ("MACs", "parameters")  # units that are counts


def in_unit(value: float, unit: str) -> str:
    """A value with its unit: bytes and counts in multiples of a thousand, scores to four decimals."""
    if unit == "bytes":
        return as_bytes(value)
    if unit in COUNTED:
        return f"{as_count(value)} {unit}"
    return f"{value:.4g} {unit}" if unit else f"{value:.4f}"


def as_bytes(n: float) -> str:
    """A size in B, kB, MB or GB."""
    for unit in ("B", "kB", "MB"):
        if round(n, 1) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def as_count(n: float) -> str:
    """A count with the suffix k, M, G or T."""
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
ALWAYS = ("params", "size_bytes", "macs", "peak_memory_bytes", "energy_j")  # others only if a model has them
ON_GPU = ("gpu_memory_bytes", "gpu_utilization_pct", "gpu_power_w")
