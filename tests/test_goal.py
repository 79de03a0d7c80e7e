import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from autocompress.gauges.latency import Latency
from autocompress.goal import OBJECTIVES, Objective, ObjectiveError, as_objective, objective
from autocompress.measurement import Measurement

DENSE = Measurement(density=1.0, params=400, size_bytes=960, macs=36000, device="cpu")
COUNTED = Measurement(density=0.25, params=100, size_bytes=480, macs=9000, device="cpu")
MEASURED = replace(COUNTED, latency=(Latency(1, 2.0, 3.0, 20), Latency(32, 16.0, 20.0, 20)))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a test register what it likes."""
    list(OBJECTIVES)  # the plugins first
    monkeypatch.setattr(OBJECTIVES, "_items", dict(OBJECTIVES._items))
    monkeypatch.setattr(OBJECTIVES, "_modules", dict(OBJECTIVES._modules))
    yield


@pytest.mark.parametrize(
    ("name", "value", "unit"),
    [
        ("density", 0.25, ""),
        ("params", 100.0, "parameters"),
        ("size", 480, "bytes"),
        ("macs", 9000, "MACs"),
        ("latency", 2.0, "ms"),
        ("throughput", 2000.0, "1/s"),
        ("memory", 640, "bytes"),
        ("energy", 7.5, "mJ"),
    ],
)
def test_what_ships(name: str, value: float, unit: str) -> None:
    found = as_objective(name)
    whole = replace(MEASURED, peak_memory_bytes=640, energy_j=0.0075)
    assert found(whole) == value
    assert isinstance(found(whole), float)
    direction = "maximize" if name == "throughput" else "minimize"
    assert (found.name, found.direction, found.unit) == (name, direction, unit)
    assert found.description.endswith(".")


def test_latency_that_was_not_measured_says_so() -> None:
    with pytest.raises(ValueError, match=r"'latency' returned None.*not measured here: latency"):
        as_objective("latency")(COUNTED)


def test_what_a_gpu_would_have_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"raised TypeError: .*not measured here: .*energy_j"):
        as_objective(lambda m: m.energy_j * 2)(MEASURED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("energy", r"'energy' returned None; .*not measured here: energy_j; NVIDIA GPUs count energy, and .*RAPL"),
        ("memory", r"not measured here: peak_memory_bytes\)"),
        ("weighted_sum(size=1, energy=2)", r"'energy' returned None; .*not measured here: energy_j; "),
    ],
)
def test_what_it_takes_to_measure_it_is_said(name: str, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        as_objective(name)(MEASURED)


def test_why_a_runtime_did_not_run_is_said() -> None:
    refused = replace(COUNTED, runtime="onnxruntime", not_run={"onnxruntime": "ONNX Runtime does not take it: no"})
    with pytest.raises(ObjectiveError, match=r"not measured here: latency_ms; ONNX Runtime does not take it: no"):
        as_objective("latency")(refused)


def test_an_objective_may_look_at_the_dense_model() -> None:
    relative = as_objective(lambda m, dense: m.size_bytes / dense.size_bytes)
    assert relative.is_relative and not as_objective("size").is_relative
    assert relative(COUNTED, DENSE) == 0.5
    assert relative(DENSE) == 1.0  # the dense model beside itself


def test_combinations_are_relative_to_the_dense_model() -> None:
    total = as_objective("weighted_sum(density=3, size=1)")
    assert total(COUNTED, DENSE) == pytest.approx((3 * 0.25 + 0.5) / 4)
    assert total(DENSE, DENSE) == 1.0
    both = as_objective("product(density, size=2)")
    assert both(COUNTED, DENSE) == pytest.approx(0.25 * 0.5**2)
    assert (both.name, both.direction, both.is_relative) == ("product(density=1, size=2)", "minimize", True)


def test_what_is_to_be_maximized_counts_the_other_way_round() -> None:
    slow = replace(DENSE, latency=(Latency(1, 4.0, 5.0, 20), Latency(32, 64.0, 70.0, 20)))
    assert as_objective("weighted_sum(throughput=1)")(MEASURED, slow) == 0.25


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("weighted_sum", r"write weighted_sum\(density=0.5, latency=0.5\)"),
        ("weighted_sum()", r"write weighted_sum\(density=0.5, latency=0.5\)"),
        ("weighted_sum(density=0)", "the weight of density is 0; it must be a positive number"),
        ("weighted_sum(density='a')", "the weight of density is 'a'"),
        ("weighted_sum(densty=1)", "did you mean density"),
        ("weighted_sum(product=1)", "'product' is a combination itself"),
        ("density(size=1)", "density is an objective by itself"),
        ("product(density, 3)", "is no objective; write"),
        ("product(density", "is no objective; write"),
        ("product(density=x)", "is no objective; write"),
        ("sum(density=1)", "unknown objective 'sum'"),
    ],
)
def test_combinations_that_mean_nothing(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_objective(spec)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "3", True, np.True_, [1.0], 1j], ids=repr)
def test_what_is_not_a_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must return a finite number"):
        Objective("mine", lambda m: value)(MEASURED)


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int64(3), Fraction(3)], ids=repr)
def test_any_real_number_will_do(value: float) -> None:
    result = Objective("mine", lambda m: value)(MEASURED)
    assert type(result) is float
    assert result == 3.0


@pytest.mark.usefixtures("registry")
def test_the_decorator_registers_under_the_functions_name() -> None:
    @objective("maximize", unit="1/s")
    def samples_per_second(measurement: Measurement) -> float | None:
        """How many.

        More text.
        """
        return measurement.throughput_per_s

    found = as_objective("samples_per_second")
    assert found is samples_per_second
    assert (found.direction, found.unit, found.description) == ("maximize", "1/s", "How many.")
    assert found(MEASURED) == 2000


@pytest.mark.usefixtures("registry")
def test_a_cell_run_twice_replaces_its_own_objective_but_nobody_elses() -> None:
    def cost(measurement: Measurement) -> float:
        return 1.0

    objective()(cost)
    assert objective()(cost) is as_objective("cost")

    def density(measurement: Measurement) -> float:
        return 0.0

    with pytest.raises(ValueError, match=r"'density' is already .*by autocompress\.objectives\.density"):
        objective()(density)
    assert as_objective("density")(MEASURED) == 0.25


def test_a_direction_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="'minimize' or 'maximize'"):
        Objective("mine", lambda m: 0.0, direction="min")  # type: ignore[arg-type]


def test_an_objective_is_taken_as_it_is() -> None:
    mine = Objective("mine", lambda m: 1.0, "maximize")
    assert as_objective(mine) is mine


def test_a_function_is_minimized_under_its_name() -> None:
    def bits(measurement: Measurement) -> float:
        return 8.0 * measurement.size_bytes

    found = as_objective(bits)
    assert (found.name, found.direction, found(COUNTED)) == ("bits", "minimize", 3840)


@pytest.mark.parametrize("function", [lambda m: 1.0, partial(round, ndigits=1)], ids=["lambda", "partial"])
def test_a_function_without_a_name_has_one_that_can_be_logged(function) -> None:
    assert as_objective(function).name == "objective"


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'latncy'; did you mean latency\? \(available: density, "):
        as_objective("latncy")


@pytest.mark.parametrize("given", [None, 3, ("size",)])
def test_what_is_no_objective_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match=r"give a name, file\.py:name or a function"):
        as_objective(given)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from autocompress.goal import objective\n"
        "def bits(measurement):\n"
        "    return 8 * measurement.size_bytes\n"
        "@objective('maximize')\n"
        "def speed(measurement):\n"
        "    return measurement.throughput_per_s\n"
        "limit = 3\n"
    )
    assert as_objective(f"{file}:bits")(COUNTED) == 3840
    assert as_objective(f"{file}:speed").direction == "maximize"
    again = as_objective(f"{file}:speed")  # the file was run twice
    assert replace(again, source="", whole="") == as_objective("speed")
    assert again.source == f"{file}:speed"
    with pytest.raises(ValueError, match="is a int, not a function of a Measurement"):
        as_objective(f"{file}:limit")
    with pytest.raises(ValueError, match=rf"write .*{file.stem}\.py:name$"):
        as_objective(str(file))


@pytest.mark.usefixtures("registry")
def test_a_file_cannot_take_the_name_of_an_objective_that_ships(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from autocompress.goal import objective\n@objective()\ndef size(measurement):\n    return 0.0\n"
    )
    with pytest.raises(ValueError, match=r"'size' is already registered, by autocompress\.objectives\.size"):
        as_objective(f"{file}:size")
    assert as_objective("size")(COUNTED) == 480


def test_objectives_survive_pickling() -> None:
    for name, registered in OBJECTIVES:
        assert pickle.loads(pickle.dumps(registered)) is registered, name
    combined = as_objective("product(density, size=2)")
    assert pickle.loads(pickle.dumps(combined))(COUNTED, DENSE) == combined(COUNTED, DENSE)
    plain = as_objective(math.fsum)
    assert pickle.loads(pickle.dumps(plain)) == plain
