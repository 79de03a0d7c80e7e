"""Constraints on what the compressed model costs."""

import math
from pathlib import Path

import pytest

from autocompress.gauges.latency import Latency
from autocompress.goal import Objective, as_objective
from autocompress.measurement import Measurement
from autocompress.verdict.constraint import Constraint
from autocompress.verdict.limit import Limit, parse_constraints


def cost(**changes: object) -> Measurement:
    measured: dict = {"density": 0.1, "params": 100, "size_bytes": 4000, "macs": 5_000_000, "device": "cpu"}
    return Measurement(**(measured | changes))


def timed(ms: float, interval: float = 0.02) -> Measurement:
    return cost(latency=(Latency(1, ms, 1.2 * ms, 100, interval=interval),))


def limit(text: str) -> Limit:
    (parsed,) = parse_constraints([text])
    assert isinstance(parsed, Limit)
    return parsed


@pytest.mark.parametrize(
    ("text", "value", "again"),
    [
        ("latency<=5ms", 5.0, "latency<=5ms"),
        (" latency <= 500 us ", 0.5, "latency<=500us"),
        ("latency<=0.1s", 100.0, "latency<=0.1s"),
        ("latency<=5", 5.0, "latency<=5"),
        ("size<=1MB", 1e6, "size<=1MB"),
        ("size<=20.5kB", 20_500.0, "size<=20.5kB"),
        ("macs<=1M", 1e6, "macs<=1M"),
        ("params<=100k", 1e5, "params<=100k"),
        ("memory<=2GiB", 2.0 * 2**30, "memory<=2GiB"),
        ("energy<=2J", 2000.0, "energy<=2J"),
        ("throughput>=10k", 1e4, "throughput>=10k"),
        ("density<=5%", 0.05, "density<=5%"),
        ("product(size, latency)<=0.1", 0.1, "product(size=1, latency=1)<=0.1"),
    ],
)
def test_what_is_written_is_what_is_meant(text: str, value: float, again: str) -> None:
    parsed = limit(text)
    assert parsed.value == pytest.approx(value)
    assert parsed.text == again
    assert limit(again).value == parsed.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latncy<=5ms", "unknown metric or objective 'latncy'; did you mean latency"),
        ("latency<=5MB", r"'MB' is no unit of latency \(us, µs, ms, s, or none for ms\)"),
        ("latency>=5ms", "would rule out what is better; write latency<=5ms"),
        ("throughput<=5", "write throughput>=5"),
        ("latency<=0ms", "latency<=0ms: the value must be a positive number"),
        ("size<=-1MB", "must be a positive number"),
        ("size<1MB", "is not a constraint; write METRIC>=VALUE"),
        ("accuracy>=1MB", "is not a constraint"),
        ("product<=2", "product combines objectives"),
        ("nowhere.py:cost<=3", "there is no file 'nowhere.py'"),
    ],
)
def test_what_is_no_limit_is_refused_in_a_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse_constraints([text])
    assert "\n" not in str(raised.value)


def test_metrics_and_costs_stand_side_by_side_and_files_may_hold_either(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def cost(m):\n    return m.params * 2\ndef score(targets, outputs):\n    return 0.5\n")
    parsed = parse_constraints(["accuracy>=90%", "size<=1MB", f"{file}:cost<=3k", f"{file}:score>=0.4"])
    assert [type(one) for one in parsed] == [Constraint, Limit, Limit, Constraint]
    mine = parsed[2]
    assert isinstance(mine, Limit) and mine.check(cost(params=1600)).value == 3200
    assert mine.text == f"{file}:cost<=3k"
    with pytest.raises(ValueError, match="name one twice"):
        parse_constraints(["size<=1MB", "size <= 1 MB"])
    with pytest.raises(ValueError, match="name one twice"):
        parse_constraints(["auc>=0.9", "auc >= 90%"])


def test_what_a_trial_makes_of_it() -> None:
    checked = limit("latency<=4ms").check(timed(5.0))
    assert checked.excess == pytest.approx(math.log(5 / 4)) and not checked.met and checked.is_cost
    assert checked.shown == "latency 5 ms"
    assert limit("latency<=5ms").check(timed(5.0)).met  # reached exactly
    assert limit("size<=4kB").check(cost()).shown == "size 4.0 kB"
    faster = Limit(Objective("speed", lambda m: m.params, direction="maximize"), 50, "50")
    assert faster.text == "speed>=50" and faster.check(cost()).excess == pytest.approx(-math.log(2))


def test_what_was_not_measured_is_said() -> None:
    with pytest.raises(ValueError, match=r"^energy<=2mJ: .*not measured here: energy_j; NVIDIA GPUs"):
        limit("energy<=2mJ").check(timed(5.0))


@pytest.mark.parametrize(
    ("ms", "standing", "said"),
    [
        (
            4.8,
            "certified",
            "Its latency is 4.8 ms, 4.704 ms to 4.896 ms with 95% confidence (required: latency<=5ms).",
        ),
        (4.95, "not certifiable", "(required: latency<=5ms)"),
        (5.05, "not certifiable", "confidence, which violates latency<=5ms."),
        (5.2, "not met", "which violates"),
    ],
)
def test_a_time_is_judged_with_its_noise(ms: float, standing: str, said: str) -> None:
    judged = limit("latency<=5ms").judge(timed(ms))
    assert judged.standing == standing
    assert said in judged.sentence


def test_a_count_is_certain() -> None:
    judged = limit("size<=4kB").judge(timed(5.0))
    assert (judged.standing, judged.lower, judged.upper) == ("certified", 4000, 4000)
    assert judged.sentence == "Its size is 4.0 kB (required: size<=4kB)."
    assert limit("params<=3k").judge(cost()).sentence.startswith("It has ")
    assert limit("size<=3kB").judge(cost()).standing == "not met"
    assert as_objective("size").unit == "bytes"
