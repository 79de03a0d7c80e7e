"""A study's outcome in words: the loss, overall and by class, its confidence bounds, and what is gained for it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from autocompress.disk.record import Record
from autocompress.showing.comparison import RUNTIMES, as_bytes, as_count, spaced, timed_together
from autocompress.verdict.change import loss_or_gain

SAME = 0.03  # latencies that differ by a smaller fraction are called the same: medians are about this accurate


def headline(record: Record) -> tuple[str, str]:
    """The outcome in a few words, and its CSS class: good, warn or bad."""
    found = record.found
    if found is None:
        running = (
            "The study is still running" if record.state == "running" else "The study did not come to its end"
        )
        return running, "warn"
    interrupted = " (the search was interrupted)" if record.state == "interrupted" else ""
    outcome, tone = {
        "certified": ("Certified: within the bound", "good"),
        "not certifiable": ("Met on validation data, not proven on test data", "warn"),
        "not met": ("Not met: the bound does not hold", "bad"),
    }.get(found["verdict"], (str(found["verdict"]), "warn"))
    return outcome + interrupted, tone


def sentence(record: Record) -> str:
    """The verdict in words; of a study without a result, how far it has come."""
    if record.found is not None:
        return str(record.found["sentence"])
    so_far = "1 trial is" if len(record.trials) == 1 else f"{len(record.trials)} trials are"
    if record.state == "running":
        return f"{so_far} finished so far; nothing has been judged on test data yet."
    return (
        f"{so_far} finished and nothing was judged on test data. autocompress tune --resume {record.name} goes on."
    )


def words(record: Record) -> list[str]:
    """The main statements on a study's answer, for a reader who did not run the study."""
    found = record.found
    if found is None or record.answer is None or "compressed" not in found["measurements"]:
        return []
    lost = [*_lost(record, found), *_tested(record, found)]
    return [*lost, *_by_class(found), *_search(found), *_smaller(found), *_faster(record, found)]


def trials_in_time(found: Mapping[str, Any]) -> str:
    """The number of trials and the time that they took; for a resumed study also the number since then."""
    n, before, took = len(found["trials"]), found.get("resumed_with", 0), f"{found['seconds']:.0f} s"
    trials = "1 trial" if n == 1 else f"{n} trials"
    if not before:
        return f"{trials} in {took}"
    return f"{trials}, {n - before or 'none'} of them in the {took} since the study was resumed"


def _lost(record: Record, found: Mapping[str, Any]) -> Iterator[str]:
    certificate = found.get("certificate")
    if not certificate:
        return
    n, metric = certificate["n"], spaced(str(certificate["metric"]))
    before, after = (found["scores"][who]["test"] for who in ("dense", "compressed"))
    counts = (
        f" ({round(before * n)} right answers before, {round(after * n)} after)" if metric == "accuracy" else ""
    )
    yield (
        f"On {n} test samples that the search never saw, {metric} went from {before:.4f} to {after:.4f}{counts}."
    )
    unit, sure = record.unit, f"{100 * certificate['confidence']:g}%"
    allowed = f"{100 * certificate['max_drop']:g}{unit}"
    upper, lower = (None if certificate[end] is None else 100 * certificate[end] for end in ("upper", "lower"))
    most, least = at_most(upper, unit), at_least(lower, unit)
    if certificate["outcome"] == "certified":
        assert upper is not None  # what has no upper bound is not certified
        loss, gain = ("loss is at most", at_most, allowed), ("gain is at least", at_least, f"a loss of {allowed}")
        (change, rounded, limit), size = loss_or_gain(upper, loss, gain)
        yield f"With {sure} confidence the true {change} {rounded(size, unit)}; {limit} was allowed."
    elif certificate["outcome"] == "not met":
        yield f"With {sure} confidence the true loss is at least {least}; only {allowed} was allowed."
    else:
        yield (
            f"With {sure} confidence the true loss is at most {most}, while {allowed} was allowed: "
            f"{n} test samples neither prove the bound nor contradict it. More test data would settle it."
        )


def _tested(record: Record, found: Mapping[str, Any]) -> Iterator[str]:
    shortlist = found.get("shortlist") or ()
    if len(shortlist) < 2:
        return

    def outcome(tested: Mapping[str, Any]) -> str:
        trial = f"trial {tested['number']} (density {tested['density']:.3g})"
        if tested["outcome"] is None:
            return f"{trial} was not tested"
        if tested["upper"] is None:
            return f"{trial} loses an unknown amount, {tested['outcome']}"
        loss, gain = ("loses at most", at_most), ("gains at least", at_least)
        (change, rounded), size = loss_or_gain(100 * tested["upper"], loss, gain)
        return f"{trial} {change} {rounded(size, record.unit)}, {tested['outcome']}"

    yield (
        f"Before the test data were looked at, {len(shortlist)} trials were chosen to be tested, densest first, "
        f"up to the first that is not certified: {'; '.join(map(outcome, shortlist))}."
    )


def at_most(amount: float | None, unit: str) -> str:
    """An upper bound in points or percent, rounded up so that it stays one."""
    return "an unknown amount" if amount is None else f"{math.ceil(100 * amount - 1e-9) / 100 + 0.0:.2f}{unit}"


def at_least(amount: float | None, unit: str) -> str:
    """A lower bound in points or percent, rounded down so that it stays one."""
    return "an unknown amount" if amount is None else f"{math.floor(100 * amount + 1e-9) / 100 + 0.0:.2f}{unit}"


def _by_class(found: Mapping[str, Any]) -> Iterator[str]:
    classes = [of_class for of_class in found.get("classes") or () if of_class["support"]]
    if not classes:
        return
    worst = min(classes, key=lambda of_class: of_class["recall"] - of_class["dense_recall"])
    if worst["recall"] >= worst["dense_recall"]:
        yield f"None of the {len(classes)} classes is found less often than before."
        return
    fewer = sum(of_class["recall"] < of_class["dense_recall"] for of_class in classes)
    before, after = (round(worst[key] * worst["support"]) for key in ("dense_recall", "recall"))
    yield (
        f"The class that lost most is {worst['name']!r}: of its {worst['support']} test samples {before} were "
        f"found before and {after} are now ({100 * worst['dense_recall']:.1f}% and {100 * worst['recall']:.1f}%). "
        f"{fewer} of {len(classes)} classes are found less often than before; few samples say little of a class."
    )


def _search(found: Mapping[str, Any]) -> Iterator[str]:
    belief = found.get("posterior")
    if belief and belief.get("p_feasible") is not None:
        n = len(found["trials"])
        trials = "one trial" if n == 1 else f"all {n} trials"
        yield (
            f"Given {trials} on validation data, the true loss is within the bound with "
            f"a probability of {100 * belief['p_feasible']:.0f}%."
        )


def _smaller(found: Mapping[str, Any]) -> Iterator[str]:
    dense, compressed = found["measurements"]["dense"], found["measurements"]["compressed"]
    times = dense["params"] / max(1, compressed["params"])
    yield (
        f"It keeps {compressed['params']:,} of {dense['params']:,} parameters ({times:.3g} times fewer), "
        f"{as_bytes(compressed['size_bytes'])} of {as_bytes(dense['size_bytes'])} on disk, and "
        f"{as_count(compressed['macs'])} of {as_count(dense['macs'])} multiply-accumulates."
    )


def _faster(record: Record, found: Mapping[str, Any]) -> Iterator[str]:
    compressed = found["measurements"]["compressed"]
    times = []
    processor = record.asked.get("provenance", {}).get("machine", {}).get("processor", "the CPU")
    device, threads = compressed["device"], ""
    if device == "cpu":
        device, n = processor, compressed.get("threads")
        threads = f" on {n} thread{'s' * (n != 1)}" if n else ""
    for before, after in timed_together(found["measurements"]):
        speedup = before["p50_ms"] / after["p50_ms"]
        how = "the same within the noise" if abs(speedup - 1) < SAME else f"{speedup:.2f} times as fast"
        took = f"{after['p50_ms']:.3g} ms instead of {before['p50_ms']:.3g} ms"
        times.append(f"{took} at batch {after['batch']} ({how})")
        runtime = RUNTIMES[after.get("runtime", "eager")]
    if times:
        yield (
            f"On {device}, a forward pass in {runtime}{threads} takes {' and '.join(times)}, by the median of "
            f"{after['repeats']} passes or so. Another device has other times: measure there."
        )
