import pytest

from autocompress.showing.comparison import (
    as_bytes,
    as_count,
    classes_that_lost,
    comparison,
    conditions,
    costs,
    ratio,
    timed_together,
)


def rows(found):
    return {row[0]: row[1:] for row in comparison(found)}


def test_dense_stands_beside_compressed_with_the_ratio(recorded):
    shown = rows(recorded.found(recorded.three_trials()))
    assert shown["score on val"] == ("0.9800", "0.9750", "-0.50 pp")
    assert shown["score on test"] == ("0.9870", "0.9800", "-0.70 pp")
    assert shown["density"] == ("1.0000", "0.0400", "")
    assert shown["parameters"] == ("10,000", "400", "25.00x")
    assert shown["weights on disk"] == ("40.0 kB", "1.6 kB", "25.00x")
    assert shown["MACs"] == ("100k", "4k", "25.00x")
    assert shown["latency, PyTorch, batch 32"] == ("0.800 ms (p95 0.900)", "0.500 ms (p95 0.600)", "1.60x")
    assert shown["GPU memory, utilization, power"] == ("n/a", "n/a", "")
    assert "GPU power" not in shown


def test_each_runtime_has_its_rows_and_what_did_not_run_is_named(recorded):
    measured = recorded.found(recorded.three_trials())["measurements"]
    taken = {"dtype": "float32", "memory_format": "channels_last", "threads": 2}
    for who, ms in (("dense", 0.4), ("compressed", 0.1)):
        measured[who] |= taken
        at = {
            "batch": 1,
            "p50_ms": ms,
            "p95_ms": 2 * ms,
            "repeats": 50,
            "interval": 0.021,
            "runtime": "onnxruntime",
        }
        measured[who]["latency"].append(at)
    del measured["compressed"]["latency"][:2]
    measured["compressed"]["not_run"] = {"eager": "only simulated"}
    shown = {row[0]: row[1:] for row in costs(measured, throughput=True)}
    assert shown["latency, ONNX Runtime, batch 1"] == (
        "0.400 ms ± 3% (p95 0.800)",
        "0.100 ms ± 3% (p95 0.200)",
        "4.00x",
    )
    assert shown["samples, ONNX Runtime, batch 1"] == ("2.5k/s", "10k/s", "4.00x")
    assert shown["latency, PyTorch, batch 1"] == ("0.200 ms (p95 0.250)", "n/a", "")
    assert [(before["p50_ms"], after["p50_ms"]) for before, after in timed_together(measured)] == [(0.4, 0.1)]
    how, why = conditions(measured)
    assert how.startswith("measured in float32, channels_last, 2 threads, on cpu")
    assert why == "no time of the compressed model in PyTorch: only simulated"
    measured["compressed"]["latency"][-1]["p50_ms"] = 0.41
    assert len(conditions(measured)) == 2  # within the noise
    measured["compressed"]["latency"][-1]["p50_ms"] = 0.45
    assert conditions(measured)[-1] == (
        "slower than the dense model in ONNX Runtime at batch 1 (0.450 ms instead of 0.400 ms)"
    )
    alone = {row[0]: row[1:] for row in costs({"dense": measured["dense"]})}
    assert alone["parameters"] == ("10,000",)


def test_what_a_gpu_used_is_shown_where_it_was_measured(recorded):
    found = recorded.found(recorded.three_trials())
    for who, joule in (("dense", 0.004), ("compressed", 0.002)):
        used = {"gpu_memory_bytes": 1_500_000_000, "gpu_utilization_pct": 71.0, "gpu_power_w": 250.0}
        found["measurements"][who] |= used | {"energy_j": joule}
    shown = rows(found)
    assert shown["GPU memory in use"][:2] == ("1.50 GB", "1.50 GB")
    assert shown["GPU utilization"][:2] == ("71%", "71%")
    assert shown["energy an inference"] == ("4.000 mJ", "2.000 mJ", "2.00x")


def test_constraints_are_shown_on_both_splits_and_violations_named(recorded):
    found = recorded.found(recorded.three_trials())
    val, test = {"value": 0.97, "excess": -0.02}, {"value": 0.93, "met": False}
    found["constraints"] = [{"constraint": "sensitivity>=0.95", "val": val, "test": test}]
    shown = rows(found)
    assert shown["sensitivity on val"] == ("", "0.9700", "")
    assert shown["sensitivity on test"] == ("", "0.9300", "violated")
    found["constraints"][0]["dense"] = {"val": 0.98, "test": 0.94}
    shown = rows(found)
    assert shown["sensitivity on val"] == ("0.9800", "0.9700", "")
    assert shown["sensitivity on test"] == ("0.9400", "0.9300", "violated")


def test_a_class_that_is_sacrificed_is_named(recorded):
    def one(name, before, after):
        return {"name": name, "support": 20, "dense_recall": before, "recall": after}

    found = recorded.found(recorded.three_trials())
    bound = found["certificate"]["max_drop"]
    found["classes"] = [one("healthy", 0.99, 0.99 - bound), one("ill", 0.9, 0.45), one("absent", None, None)]
    assert classes_that_lost(found) == [("ill", "20", "0.9000", "0.4500", "-45.00 pp")]
    assert classes_that_lost({**found, "certificate": None}) == []


def test_without_a_compressed_model_there_is_nothing_to_compare(recorded):
    assert comparison(recorded.found(recorded.three_trials(), answer=None)) == []


def test_a_ratio_needs_two_numbers_above_zero():
    assert ratio(10, 5) == "2.00x"
    assert ratio(None, 5) == ratio(10, None) == ratio(10, 0) == ""


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (318_536, "318.5 kB"),
        (999_949, "999.9 kB"),
        (999_960, "1.0 MB"),
        (1_234_567, "1.2 MB"),
        (2_500_000_000, "2.50 GB"),
        (1.5e12, "1500.00 GB"),
    ],
)
def test_bytes_are_in_the_unit_that_suits_them(n, text):
    assert as_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (763_520, "763.5k"),
        (999_999, "1M"),
        (12_345_678, "12.35M"),
        (4_100_000_000, "4.1G"),
        (999_960_000_000, "1T"),
        (1.2e13, "12T"),
    ],
)
def test_counts_are_in_thousands_millions_and_billions(n, text):
    assert as_count(n) == text
