"""Studies as they lie on disk, made up for tests: no training, any state."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LATENCY = {"dense": (0.2, 0.25, 0.8, 0.9), "compressed": (0.18, 0.2, 0.5, 0.6)}


def measurement(params: int = 1000, *, timed: str = "") -> dict[str, Any]:
    """The JSON of a `Measurement` on the CPU; with latency where ``timed`` says whose."""
    times = LATENCY.get(timed, ())
    latency = [
        {"batch": batch, "p50_ms": times[i], "p95_ms": times[i + 1], "repeats": 100}
        for batch, i in ((1, 0), (32, 2))
        if times
    ]
    absent = ("gpu_memory_bytes", "gpu_utilization_pct", "gpu_power_w", "energy_j")
    return {
        "density": params / 10_000,
        "params": params,
        "size_bytes": 4 * params,
        "macs": 10 * params,
        "device": "cpu",
        "latency": latency,
        "threads": 1 if timed else None,
        "peak_memory_bytes": 8 * params if timed else None,
        **dict.fromkeys(absent),
    }


def trial(number: int, density: float, drop: float, *, bound: float = 0.01) -> dict[str, Any]:
    """The JSON of a `TrialResult`."""
    return {
        "number": number,
        "density_asked": density,
        "density": density,
        "score": 0.98 - drop,
        "drop": drop,
        "drop_se": 0.004,
        "feasible": drop <= bound,
        "values": [density],
        "seconds": 2.0,
        "measurement": measurement(int(10_000 * density)),
        "plan": {},
        "curves": {"lc_density": [0.5, 0.2, density], "lc_residual": [0.5, 0.01, 0.0001]},
    }


def asked(**changes: Any) -> dict[str, Any]:
    """The content of ``study.json``."""
    return {
        "task": "digits",
        "fingerprint": "0123456789abcdef",
        "metric": "accuracy",
        "scheme": "StructPrune",
        "max_drop": 0.01,
        "drop": "absolute",
        "objective": "density",
        "sampler": "threshold",
        "seed": 0,
        "recovery": {"epochs": 30.0, "lr": 0.1},
        "autocompress": "0.1.0",
        "provenance": {
            "begun": "2026-11-20T15:38:46+00:00",
            "command": "autocompress tune --scheme StructPrune --max-drop 1%",
            "versions": {"python": "3.11.7", "torch": "2.15.0"},
            "machine": {"system": "Linux", "processor": "a processor, 2 cores"},
            "data": {
                "train": {"n": 800, "sha256": None},
                "val": {"n": 449, "sha256": "ab" * 32},
                "test": {"n": 450, "sha256": "cd" * 32},
            },
        },
        "trials": 8,
        "timeout": None,
        "device": "cpu",
        **changes,
    }


def found(trials: Sequence[dict[str, Any]], answer: int | None = 2, **changes: Any) -> dict[str, Any]:
    """The content of ``result.json``; without an answer, of a search that found nothing."""
    chosen = next((one for one in trials if one["number"] == answer), None)
    grid = [0.01, 0.1, 1.0]
    certificate = {
        "outcome": "not certifiable",
        "drop": 0.0067,
        "upper": 0.0163,
        "lower": -0.003,
        "n": 450,
        "confidence": 0.95,
        "max_drop": 0.01,
        "relative": False,
        "metric": "accuracy",
        "higher_is_better": True,
    }
    measured = {"dense": measurement(10_000, timed="dense" if chosen else "")}
    scores = {"dense": {"val": 0.98}}
    if chosen:
        measured["compressed"] = measurement(int(10_000 * chosen["density"]), timed="compressed")
        scores = {"dense": {"val": 0.98, "test": 0.987}, "compressed": {"val": 0.975, "test": 0.98}}
    return {
        "name": "demo",
        "verdict": "not certifiable" if chosen else "not met",
        "sentence": "Met on validation, not certifiable." if chosen else "Not met: of 2 trials none loses 1 pp.",
        "density": chosen["density"] if chosen else 1.0,
        "drop_pp": {
            "val": 100 * chosen["drop"] if chosen else 0.0,
            "test": 0.67 if chosen else None,
            "upper": 1.63 if chosen else None,
        },
        "scores": scores,
        "measurements": measured,
        "certificate": certificate if chosen else None,
        "threshold": [0.01, 0.05],
        "posterior": {
            "mass": 0.8,
            "density": grid,
            "drop_pp": [4.0, 0.5, 0.0],
            "low_pp": [2.0, 0.1, 0.0],
            "high_pp": [6.0, 0.9, 0.0],
            "p_feasible": 0.92 if chosen else None,
        },
        "stopped": "the budget of trials is spent",
        "seconds": 23.0,
        "answer": answer if chosen else None,
        "trials": [{"number": one["number"]} for one in trials],
        "failed": [],
        "layers": [layer("stem", 16, 2), layer("head", 10, 10)] if chosen else [],
        "artifacts": {"onnx": "/elsewhere/best/model.onnx"} if chosen else {},
        "not_exported": {},
        "classes": None,
        "confusion": None,
        "folder": "/elsewhere",
        **changes,
    }


def layer(name: str, dense_width: int, width: int) -> dict[str, Any]:
    """One of ``result.json``'s layers."""
    return {
        "name": name,
        "kind": "Conv2d",
        "dense_width": dense_width,
        "width": width,
        "dense_params": 9 * dense_width,
        "params": 9 * width,
    }


def by_class(names: Sequence[str]) -> dict[str, Any]:
    """``classes`` and ``confusion`` of ten samples a class; of the last class the compressed model misses two."""
    n = len(names)
    dense = [[10 if i == j else 0 for j in range(n)] for i in range(n)]
    compressed = [list(row) for row in dense]
    compressed[-1][-1], compressed[-1][0] = 8, 2
    classes = [
        {
            "name": name,
            "support": 10,
            "dense_recall": 1.0,
            "recall": 0.8 if i == n - 1 else 1.0,
            "dense_precision": 1.0,
            "precision": None if i == n - 1 else 10 / 12 if i == 0 else 1.0,
        }
        for i, name in enumerate(names)
    ]
    return {"classes": classes, "confusion": {"dense": dense, "compressed": compressed}}


def decided() -> dict[str, Any]:
    """``decision_thresholds`` of one class, which lost two points of specificity on test."""

    def at(probability: float, specificity: float) -> dict[str, Any]:
        return {
            "metric": "specificity@sensitivity=0.95",
            "class_name": "ill",
            "probability": probability,
            "val": {"sensitivity": 0.9512, "specificity": 0.93},
            "test": {"sensitivity": 0.97, "specificity": specificity},
            "lower": {"sensitivity": 0.94129, "specificity": specificity - 0.04},
        }

    return {"decision_thresholds": {"dense": [at(0.281, 0.92)], "compressed": [at(0.312, 0.9)]}}


def write_study(
    home: Path,
    name: str = "demo",
    *,
    settings: dict[str, Any] | None = None,
    trials: Sequence[dict[str, Any]] | None = None,
    result: dict[str, Any] | None = None,
) -> Path:
    """Writes a study's folder; without ``result`` one that did not come to its end."""
    folder = home / name
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(settings or asked()))
    for one in three_trials() if trials is None else trials:
        place = folder / "trials" / f"{one['number']:04d}"
        place.mkdir(parents=True)
        (place / "trial.json").write_text(json.dumps(one))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def three_trials() -> list[dict[str, Any]]:
    """One beyond the bound, one within it, one far beyond it."""
    return [trial(1, 0.02, 0.0156), trial(2, 0.04, 0.005), trial(3, 0.005, 0.6)]


def many_trials(n: int) -> list[dict[str, Any]]:
    """``n`` trials along a cliff."""
    return [trial(i, 0.005 * 1.01**i, 0.3 * math.exp(-i / 20)) for i in range(1, n + 1)]
