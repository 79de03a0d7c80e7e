"""The Python API in this process: real searches on a task that is trained in a moment."""

import copy
import io
import json
import os
import re
import signal
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autocompress as ac
from autocompress.disk.files import read_json
from autocompress.goal import OBJECTIVES, as_objective
from autocompress.lc import LearningCompression
from autocompress.metrics import Metric
from autocompress.scheme import SCHEMES, describe
from autocompress.studies.settings import Settings
from autocompress.terminal.show import show_result
from autocompress.trial import Bound
from autocompress.verdict.prospect import one_answer, prospect

DENSE_PARAMS = 859
SHORT = {"trials": 2, "epochs": 3.0, "max_drop": 0.2}


def vectors(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of shape (16,) around the centre of their class, of three."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 16, generator=generator)
    x[torch.arange(n), y] += 3.0
    return x, y


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model, (x, y) = network(), vectors(256, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def task(trained: nn.Module) -> ac.Task:
    return ac.Task(copy.deepcopy(trained), vectors(256, 1), vectors(120, 2), vectors(121, 3), name="vectors")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all the studies here, as a user has: the database is made once."""
    return tmp_path_factory.mktemp("api") / "runs"


@pytest.fixture
def registries():
    """Takes back what a test registers."""
    before = [(registry, dict(registry._items), dict(registry._modules)) for registry in (SCHEMES, OBJECTIVES)]
    yield
    for registry, items, modules in before:
        registry._items, registry._modules = items, modules


class Recorder:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.warnings: list[str] = []
        self.beginning: ac.result.Beginning | None = None
        self.best: list[float | None] = []

    def doing(self, what):
        self.events.append("doing")

    def began(self, beginning):
        self.events.append("began")
        self.beginning = beginning

    def trial(self, result, best, belief):
        self.events.append(f"trial {result.number}")
        self.best.append(best.density if best else None)
        assert belief is None or belief.interval()[0] < belief.interval()[1]

    def failed(self, number, reason):
        self.events.append(f"failed {number}")

    def warned(self, message):
        self.warnings.append(message)


def snapshot(model: nn.Module) -> list[object]:
    parameters = [(p.device, p.requires_grad, p.grad, id(p)) for p in model.parameters()]
    return [parameters, [module.training for module in model.modules()]]


def test_several_objectives_and_a_limit_on_a_cost_from_the_question_to_the_report(task, out):
    settings = {**SHORT, "trials": 3, "constraints": ["size<=2.5kB"], "name": "front", "out": out}
    result = ac.tune(task, objective=["size", "macs"], **settings)
    found = read_json(result.folder / "result.json")
    assert [one["name"] for one in found["objectives"]] == ["size", "macs"]
    assert found["front"] and result.front == tuple(one["number"] for one in found["front"])
    by_number = {record.number: record for record in result.records}
    for one in found["front"]:
        record = by_number[one["number"]]
        assert record.feasible and list(one["values"].values()) == list(record.values)
        assert record.values == (record.measurement.size_bytes, record.measurement.macs)
    for record in result.records:
        (checked,) = record.constraints
        assert checked.met == (record.measurement.size_bytes <= 2500) and (checked.met or not record.feasible)
    assert "Its size is " in result.sentence
    assert (result.folder / "figures" / "front.svg").is_file()
    assert "size and macs" in (result.folder / "report.md").read_text()
    shown = io.StringIO()
    show_result(Console(file=shown, width=110), found, result.folder)
    assert "drop on val" in shown.getvalue() and "(the answer)" in shown.getvalue()
    with pytest.raises(ValueError, match=r"was made with objective \['size', 'macs'\], not 'size'"):
        ac.tune(task, objective="size", resume="front", **{k: v for k, v in settings.items() if k != "name"})


def test_a_search_on_tensors_from_the_question_to_the_result(task, out):
    task.model.train()
    next(task.model.parameters()).requires_grad_(False)
    before, state = snapshot(task.model), copy.deepcopy(task.model.state_dict())
    watcher = Recorder()
    result = ac.tune(task, scheme="StructPrune", out=out, name="tensors", watcher=watcher, **SHORT)

    assert result.name == "tensors" and result.folder == (out / "tensors").resolve()
    assert result.verdict == "certified" and result.met and not result.interrupted
    assert result.sentence.startswith("Certified: on 121 test samples")
    kept = sum(p.numel() for p in result.model.parameters())
    dense = sum(p.numel() for p in task.model.parameters())
    assert result.density == kept / dense < 0.6
    assert not result.model.training
    folder = (out / "tensors").resolve()
    said = f"<Result 'tensors': certified, density {result.density:.4g}, 2 trials, in {folder}>"
    assert repr(result) == said  # not the thousands of numbers that it holds
    x, y = task.test.x, task.test.y
    with torch.inference_mode():
        score = float((result.model(x).argmax(1) == y).float().mean())
    assert score == pytest.approx(result.scores["compressed"]["test"])

    assert set(result.measurements) == {"dense", "compressed"}
    assert result.measurements["compressed"].params == kept
    assert result.measurements["dense"].latency_ms > 0
    trials = result.trials
    assert isinstance(trials, pd.DataFrame)
    assert list(trials.number) == [1, 2]
    assert trials.density.dtype == np.float64
    assert set(trials) >= {"density", "score", "drop_pp", "feasible", "value", "params", "size_bytes", "seconds"}
    assert read_json(result.folder / "result.json") == json.loads(json.dumps(result.to_json()))

    # The model that was handed over is as it was.
    assert snapshot(task.model) == before
    assert all(torch.equal(value, state[name]) for name, value in task.model.state_dict().items())

    told = [event for event in watcher.events if event != "doing"]
    assert told == ["began", "trial 1", "trial 2"]
    assert watcher.events[-1] == "doing"  # logging
    assert watcher.warnings == []
    assert watcher.beginning.name == "tensors"
    assert watcher.beginning.dense.params == dense == DENSE_PARAMS
    assert watcher.beginning.low < 0.6
    assert watcher.best[-1] == result.density

    again = ac.load(result.folder / "best", network())
    with torch.inference_mode():
        torch.testing.assert_close(again(x), result.model(x))
    again = ac.load(result.folder, network())
    with torch.inference_mode():
        torch.testing.assert_close(again(x), result.model(x))
    with pytest.raises(ValueError, match="pass model="):
        ac.load(result.folder / "best")


def test_a_metric_at_an_operating_point_gives_the_deployed_model_its_threshold(task, out):
    names = ("a", "b", "c")
    task = ac.Task(
        task.model, task.train, task.val, task.test, metric="specificity[b]@sensitivity=90%", classes=names
    )
    constraint = "sensitivity@specificity=0.7>=0.5"
    result = ac.tune(task, constraints=constraint, out=out, name="decided", **SHORT)
    by_metric = {(at.metric, at.class_name): at for at in result.decision_thresholds["compressed"]}
    point = "sensitivity@specificity=0.7"
    assert list(by_metric) == [("specificity[b]@sensitivity=0.9", "b"), *((point, name) for name in names)]
    assert len(result.decision_thresholds["dense"]) == len(by_metric)
    at = by_metric["specificity[b]@sensitivity=0.9", "b"]
    assert at.val.specificity == pytest.approx(result.scores["compressed"]["val"])  # the search's own score
    with torch.inference_mode():
        found = torch.softmax(result.model(task.test.x), dim=1)[:, 1] >= at.probability
    is_b = task.test.y == 1
    assert at.test.sensitivity == pytest.approx(float(found[is_b].float().mean()))
    assert at.test.specificity == pytest.approx(float((~found[~is_b]).float().mean()))

    stored = read_json(result.folder / "result.json")["decision_thresholds"]
    assert stored["compressed"][0]["probability"] == at.probability
    plan = read_json(result.folder / "best" / "plan.json")
    assert plan["results"]["decision_thresholds"] == stored["compressed"]
    assert at.sentence in (result.folder / "best" / "README.md").read_text(encoding="utf-8")
    report = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "Decision thresholds" in report and f"{at.probability:.4g}" in report


COUNTED = ("params", "density", "size_bytes", "macs")


def test_an_answer_is_measured_again_as_the_docstring_says(out):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    task = ac.Task(model, vectors(256, 1), vectors(120, 2), vectors(121, 3))
    result = ac.tune(task, scheme="Prune", out=out, name="zeros", **SHORT)
    (example,) = re.findall(r"::\n\n(.+)", ac.measure.__doc__, re.DOTALL)
    *lines, last = textwrap.dedent(example).strip().splitlines()
    named = {"ac": ac, "result": result, "task": task}
    exec("\n".join(lines), named)
    again, compressed = eval(last, named), result.measurements["compressed"]
    assert [getattr(again, name) for name in COUNTED] == [getattr(compressed, name) for name in COUNTED]
    assert compressed.density < 1
    plain = ac.measure(result.model, task.example_input, timing=False)
    assert (plain.params, plain.density) == (result.measurements["dense"].params - 24, 1)  # a bias for BatchNorm


def test_data_loaders_a_scheme_object_and_a_function_to_minimize(task, out):
    train, val, test = (
        DataLoader(TensorDataset(split.x, split.y), batch_size=32, shuffle=split is task.train)
        for split in (task.train, task.val, task.test)
    )
    served = ac.Task(task.model, train, val, test, name="vectors")
    scheme = ac.parse_scheme("Prune(min_keep=2)")
    result = ac.tune(served, scheme, objective=lambda m: m.size_bytes / 1e3, out=out, name="loaders", **SHORT)
    assert result.met
    asked = json.loads((result.folder / "study.json").read_text())
    assert asked["scheme"] == describe(scheme) == "Prune(min_keep=2)"
    assert asked["objective"] == "objective"
    assert list(result.trials.value) == [size / 1e3 for size in result.trials.size_bytes]
    zeros = sum(int((p == 0).sum()) for p in result.model.parameters())
    assert zeros >= (1 - result.density) * sum(p.numel() for p in result.model.parameters())


def test_a_decorated_objective_is_maximized(task, out, registries):
    @ac.objective(direction="maximize", unit="parameters")
    def removed(m):
        """Parameters that are gone."""
        return DENSE_PARAMS - m.params

    assert as_objective("removed") is removed
    result = ac.tune(task, "StructPrune", objective="removed", out=out, name="maximize", drop="relative", **SHORT)
    trials = result.trials
    assert list(trials.value) == list(DENSE_PARAMS - trials.params)
    feasible = trials[trials.feasible]
    assert result.density in set(feasible.density)
    dense = result.scores["dense"]["val"]
    assert result.drop_val == pytest.approx((dense - result.scores["compressed"]["val"]) / dense)
    assert (result.folder / "best" / "model.onnx").is_file()


def test_a_scheme_without_a_density_is_tried_once_and_mlflow_may_fail(task, tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    watcher = Recorder()
    result = ac.tune(task, "Quantize16", trials=5, out=tmp_path, name="once", watcher=watcher)
    assert result.stopped == "the scheme has no density to search over"
    assert len(result.trials) == 1
    assert result.threshold is None
    assert result.density == 1.0
    assert result.met
    assert result.measurements["compressed"].size_bytes < result.measurements["dense"].size_bytes
    (warning,) = watcher.warnings
    assert warning.startswith("MLflow: ")
    assert (result.folder / "result.json").is_file()
    assert (result.folder / "best" / "model.pt2").is_file()


@pytest.fixture
def strict(task: ac.Task) -> ac.Task:
    """A task in which every answer that differs from the dense model's is wrong."""
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        y = task.model(x).argmax(1)
    return ac.Task(task.model, task.train, (x, y), task.test, name="vectors")


HOPELESS = {"max_drop": 0.0, "epochs": 0.01, "sampler": "random"}


def test_nothing_within_the_bound_gives_the_dense_model_back(strict, out):
    watcher = Recorder()
    result = ac.tune(strict, "StructPrune", trials=1, out=out, name="none", watcher=watcher, **HOPELESS)
    assert not result.met and result.verdict == "not met"
    assert result.density == 1.0
    assert result.certificate is None
    assert result.exported.artifacts == ()
    state = strict.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())
    assert not (result.folder / "best").exists()
    with pytest.raises(ValueError, match="'none' has no answer to load: its verdict is 'not met'"):
        ac.load(result.folder / "best", network())
    assert watcher.best == [None]
    (row,) = result.trials.to_dict("records")
    assert f"the nearest, of density {row['density']:.3g}, loses {row['drop_pp']:.2f} pp." in result.sentence


def test_a_constraint_that_is_met_at_the_cost_of_a_class_is_noted_with_the_answer(task, out):
    """The metric allows any model, and every model meets the constraints."""
    task.metric = Metric("anything", lambda targets, outputs: 1.0)
    constraints = [f"specificity[{k}]>=0" for k in range(3)]
    watcher = Recorder()
    asked = {"trials": 3, "epochs": 0.001, "max_drop": 0.01, "name": "traded"}
    result = ac.tune(task, constraints=constraints, **asked, out=out, watcher=watcher)
    noted = [note for note in result.notes if "is met at the cost of sensitivity[" in note]
    assert noted and noted == watcher.warnings
    assert result.to_json()["notes"] == list(result.notes)
    assert noted[0] in (result.folder / "report.html").read_text(encoding="utf-8").replace("&gt;", ">")


def test_a_constraint_that_alone_is_missed_is_what_the_sentence_and_the_notes_name(task, out):
    result = ac.tune(task, max_drop=0.9, trials=1, epochs=0.01, constraints="f1>=1", out=out, name="floor")
    (record,) = result.records
    assert (
        f"{'loses' if record.drop >= 0 else 'gains'} {100 * abs(record.drop):.2f} pp and has f1" in result.sentence
    )
    assert "What may help: a looser constraint, more epochs" in result.sentence
    (missed,) = (note for note in result.notes if "f1" in note)
    assert missed.startswith("the dense model itself has f1 0.") and missed.endswith("which violates f1>=1")
    assert result.to_json()["notes"] == list(result.notes)
    assert missed in (result.folder / "report.html").read_text(encoding="utf-8").replace("&gt;", ">")
    assert "the dense model itself has f1" in (result.folder / "report.md").read_text(encoding="utf-8")


def test_the_nearest_miss_of_limits_on_costs_reads_as_a_sentence(strict, out):
    limits = ["density<=0.9", "size<=1B", "macs<=1"]
    result = ac.tune(strict, "StructPrune", trials=1, out=out, name="limits", constraints=limits, **HOPELESS)
    (record,) = result.records
    assert result.sentence == (
        "Not met: no trial loses at most 0 pp and meets density<=0.9 and size<=1B and macs<=1 on "
        f"val; the nearest, of density {record.density:.3g}, loses {100 * record.drop:.2f} pp and has size "
        f"{record.measurement.size_bytes / 1000:.1f} kB and macs {record.measurement.macs} MACs. What may help: a "
        "larger drop, a looser constraint, more epochs of recovery than 0.01, another scheme than StructPrune, or "
        "more trials than 1."
    )


def test_a_resumed_study_keeps_its_trials_and_its_terms(strict, out):
    def go_on(scheme="StructPrune", **changes):
        return ac.tune(strict, scheme, **{"out": out, "resume": "long", "trials": 3, **HOPELESS, **changes})

    first = ac.tune(strict, "StructPrune", trials=2, out=out, name="long", **HOPELESS)
    with pytest.raises(ValueError, match=r"'long' was made with scheme 'StructPrune', not 'Prune'"):
        go_on("Prune")
    with pytest.raises(ValueError, match=r"'long' was made with seed 0, not 1"):
        go_on(seed=1)
    with pytest.raises(ValueError, match=r"'long' was made with max_drop 0\.0, not 0\.1"):
        go_on(max_drop=0.1)
    with pytest.raises(ValueError, match=r"there is no study 'lon' in .*long"):
        go_on(resume="lon")
    with pytest.raises(ValueError, match=r"a study named 'long' is in .* already"):
        go_on(resume=None, name="long")

    watcher = Recorder()
    settings = json.loads((out / "long" / "study.json").read_text())
    assert settings["tracking_uri"] is None
    (out / "long" / "study.json").write_text(json.dumps(settings | {"tracking_uri": "http://127.0.0.1:9"}))
    resumed = go_on(watcher=watcher)
    assert [line for line in watcher.warnings if line.startswith("MLflow: http://127.0.0.1:9 does not answer")]
    pd.testing.assert_frame_equal(resumed.trials.head(2), first.trials)
    assert list(resumed.trials.number) == [1, 2, 3]
    assert [event for event in watcher.events if event.startswith("trial")] == ["trial 1", "trial 2", "trial 3"]


def test_another_seed_gives_other_densities_and_other_weights(strict, out):
    found, weights = [], []
    for name, seed in (("one", 1), ("one-again", 1), ("two", 2)):
        result = ac.tune(strict, "StructPrune", trials=2, seed=seed, out=out, name=name, **HOPELESS)
        found.append(result.trials[["density", "score", "drop_pp"]].values.tolist())
        weights.append([file.read_bytes() for file in sorted(result.folder.glob("trials/*/model.safetensors"))])
    assert found[0] == found[1] != found[2]
    assert weights[0] == weights[1]
    assert not set(weights[0]) & set(weights[2])


def test_a_resumed_study_proposes_densities_of_its_own(strict, out):
    ac.tune(strict, "StructPrune", trials=2, out=out, name="again", **HOPELESS)
    resumed = ac.tune(strict, "StructPrune", trials=4, out=out, resume="again", **HOPELESS)
    assert resumed.trials.density_asked.is_unique


def test_a_resumed_study_is_the_study_that_was_not_interrupted(strict, out):
    asked = HOPELESS | {"sampler": "bisection", "out": out}
    ac.tune(strict, "StructPrune", trials=2, name="halves", **asked)
    resumed = ac.tune(strict, "StructPrune", trials=3, resume="halves", **asked).trials
    whole = ac.tune(strict, "StructPrune", trials=3, name="whole", **asked).trials
    columns = ["number", "density_asked", "density", "score", "drop_pp", "value"]
    pd.testing.assert_frame_equal(resumed[columns], whole[columns])


def test_a_constraint_on_a_class_that_test_lacks_is_refused_before_the_search(trained, out) -> None:
    x, y = vectors(121, 3)
    few = ac.Task(copy.deepcopy(trained), vectors(256, 1), vectors(120, 2), (x[y != 2], y[y != 2]), name="few")
    required = "specificity[2]@sensitivity=90%>=1%"
    with pytest.raises(ValueError, match=r"metric specificity\[2\]@sensitivity=0\.9 cannot be scored on test: "):
        ac.tune(few, constraints=required, out=out, name="lacks", **SHORT)
    assert not list((out / "lacks").glob("trials/*/trial.json"))


def test_the_search_ends_within_the_tolerance_and_the_verdict_has_the_confidence_asked_for(task, out):
    with pytest.raises(ValueError, match=r"tolerance=0; it must be positive"):
        ac.tune(task, tolerance=0, out=out)
    with pytest.raises(ValueError, match=r"confidence=95 must lie between 0\.5 and 1"):
        ac.tune(task, confidence=95, out=out)
    changes = {**SHORT, "trials": 12, "tolerance": 9.0, "confidence": 0.8}
    result = ac.tune(task, "StructPrune", out=out, name="wide", **changes)
    assert len(result.trials) < 12
    assert "within the tolerance of 900%" in result.stopped
    assert result.certificate is not None and result.certificate.confidence == 0.8
    assert "with 80% confidence" in result.sentence


def test_what_is_damaged_on_disk_is_named_and_the_rest_goes_on(task, out):
    first = ac.tune(task, "StructPrune", out=out, name="damaged", **SHORT)
    journal, weights = (out / "damaged" / name for name in ("journal.log", "trials/0001/model.safetensors"))
    journal.write_bytes(journal.read_bytes().replace(b"score", b"sc\xffre", 1))
    flipped = bytearray(weights.read_bytes())
    flipped[-100] ^= 1
    weights.write_bytes(flipped)
    watcher = Recorder()
    again = ac.tune(task, "StructPrune", out=out, resume="damaged", watcher=watcher, **SHORT | {"trials": 3})
    assert [warning for warning in watcher.warnings if "journal.log is damaged; it is kept as" in warning]
    assert list(again.trials.number) == [1, 2, 3]
    pd.testing.assert_frame_equal(again.trials.head(2), first.trials)
    assert again.met and again.answer != 1


def test_ctrl_c_once_ends_the_search_with_the_trial_that_runs(strict, out):
    class Impatient(Recorder):
        def trial(self, result, best, belief):
            super().trial(result, best, belief)
            os.kill(os.getpid(), signal.SIGINT)

    watcher = Impatient()
    result = ac.tune(strict, "StructPrune", trials=9, out=out, name="stopped", watcher=watcher, **HOPELESS)
    assert result.interrupted
    assert len(result.records) == 1
    assert [line for line in watcher.warnings if "Ctrl-C again stops it at once" in line] == watcher.warnings[-1:]
    assert "(the search was interrupted)" in (result.folder / "report.html").read_text()


@pytest.mark.slow
def test_ctrl_c_while_the_study_concludes_says_how_to_go_on(strict, out):
    class AtTheEnd(Recorder):
        def doing(self, what):
            super().doing(what)
            if what == "writing the report":
                os.kill(os.getpid(), signal.SIGINT)

    watcher = AtTheEnd()
    with pytest.raises(KeyboardInterrupt):
        ac.tune(strict, "StructPrune", trials=1, out=out, name="cut", watcher=watcher, **HOPELESS)
    kept = "every finished trial is kept, and autocompress tune --resume cut --out"
    assert kept in watcher.warnings[-1]


def test_a_report_that_cannot_be_written_costs_one_warning(strict, out):
    class InTheWay(Recorder):
        def began(self, beginning):
            super().began(beginning)
            (beginning.folder / "figures").touch()

    watcher = InTheWay()
    result = ac.tune(strict, "StructPrune", trials=1, out=out, name="unreported", watcher=watcher, **HOPELESS)
    assert result.verdict == "not met"
    assert (result.folder / "result.json").is_file()
    assert "no report: FileExistsError" in watcher.warnings[-1]
    assert re.search(r"autocompress report unreported --out \S+ tries again", watcher.warnings[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_drop": 1.0}, "max_drop=1.0; it must be at least 0 and below 1"),
        ({"max_drop": -0.01}, "max_drop=-0.01"),
        ({"max_drop": float("nan")}, "max_drop=nan"),
        ({"drop": "both"}, "drop='both'; it must be 'absolute' or 'relative'"),
        ({"trials": 0}, "trials=0; it must be at least 1"),
        ({"timeout": 0.0}, "timeout=0.0; it must be positive"),
        ({"epochs": 0.0}, "epochs"),
        ({"epochs": -1.0}, "epochs"),
        ({"sampler": "nope"}, "nope.*threshold"),
        ({"scheme": "StructPrun"}, "did you mean StructPrune"),
        ({"objective": "densty"}, "did you mean density"),
        ({"objective": 3}, "objective=3; give a name"),
        ({"device": "tpu"}, "device='tpu'; it must be auto, cpu, cuda"),
        ({"name": "../x"}, r"name='\.\./x'"),
        ({"resume": "nothing"}, "there is no study 'nothing'"),
        ({"seed": -1}, "seed=-1; it must be at least 0"),
    ],
    ids=str,
)
def test_arguments_are_refused_before_anything_is_made(task, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ac.tune(task, **{"out": tmp_path / "runs", **arguments})
    assert not list(tmp_path.glob("runs/*/study.json"))


@pytest.mark.parametrize("value", [float("nan"), "small", None, True])
def test_an_objective_without_a_number_leaves_no_study_behind(task, out, value):
    with pytest.raises(ValueError, match=r"the objective 'bad' returned .*finite number"):

        def bad(m):
            return value

        ac.tune(task, objective=bad, out=out, name="bad", **SHORT)
    assert not (out / "bad" / "study.json").exists()


def test_settings_check_themselves_and_name_the_study(task):
    scheme, size = ac.parse_scheme("StructPrune"), as_objective("size")
    asked = {"schemes": (scheme,), "bound": Bound(0.01), "objectives": (size,)}
    for wrong, message in [({"trials": 0}, "trials=0"), ({"timeout_s": -1.0}, "timeout=-1")]:
        with pytest.raises(ValueError, match=message):
            Settings(**asked, **wrong)
    settings = Settings(**asked, recovery=LearningCompression(epochs=7))
    identity = settings.identity(task)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["task"] == "vectors" and identity["metric"] == "accuracy"
    assert identity["scheme"] == "StructPrune" and identity["objective"] == "size"
    assert identity["recovery"]["epochs"] == 7
    # How long it may take and where it runs make no other study of it.
    assert Settings(**asked, trials=99, timeout_s=1.0).identity(task) == Settings(**asked).identity(task)


def test_a_validation_loader_that_shuffles_is_refused_in_words(task, out):
    def loader(split, shuffle):
        return DataLoader(TensorDataset(split.x, split.y), batch_size=32, shuffle=shuffle)

    shuffled = ac.Task(
        task.model, loader(task.train, True), loader(task.val, True), loader(task.test, False), name="vectors"
    )
    with pytest.raises(ValueError, match="shuffle"):
        ac.tune(shuffled, "StructPrune", out=out, name="shuffled", **SHORT)


# More than the density


def test_a_search_over_schemes_criteria_and_settings_from_the_question_to_the_result(task, out):
    search = {"criterion": ["l2", "l1"], "lr": [0.05, 0.1]}
    asked = {"scheme": ["Prune", "StructPrune"], "search": search, "objective": "size"} | SHORT | {"trials": 3}
    result = ac.tune(task, out=out, name="arms", **asked)
    rows = result.trials
    tried = list(zip(rows["scheme"], rows["criterion"], rows["lr"], strict=True))
    assert tried[:2] == [("Prune", "l2", 0.05), ("Prune", "l2", 0.1)]  # each combination once to begin with
    found = json.loads((result.folder / "result.json").read_text())
    answer = rows[rows["number"] == result.answer].iloc[0]
    assert found["chosen"] == {name: answer[name] for name in ("scheme", "criterion", "lr")}
    assert found["params"]["compressed"] == answer["params"]
    plan = json.loads((result.folder / "best" / "plan.json").read_text())
    assert plan["scheme"].startswith(f"Prune(criterion='{answer['criterion']}'")
    again = ac.load(result.folder / "best", copy.deepcopy(task.model))
    x = task.test.x
    with torch.inference_mode():
        assert torch.allclose(again(x), result.model(x), atol=1e-5)
    resumed = ac.tune(task, out=out, resume="arms", **asked | {"trials": 4})
    assert list(resumed.trials["number"]) == [1, 2, 3, 4]
    assert "scheme=Prune, criterion=l2, lr=0.1" in (result.folder / "report.md").read_text().replace("\\", "")
    with pytest.raises(ValueError, match="was made with search"):
        ac.tune(task, out=out, resume="arms", **asked | {"search": {"criterion": ["l2"]}})


def test_stage_densities_and_a_learning_rate_are_searched_by_a_sampler_of_optuna(strict, out):
    asked = {"search": "stage-density; lr=0.01..0.2", "trials": 3, "epochs": 0.01, "max_drop": 0.0}
    result = ac.tune(strict, scheme="Prune", out=out, name="stages", **asked)
    assert {"lr", "stage-density.2"} <= set(result.trials.columns)
    assert result.trials["lr"].nunique() == 3
    assert json.loads((result.folder / "study.json").read_text())["sampler"] == "gp"
    assert result.threshold is None  # there is no one curve
    runs = mlflow_runs(out, "stages")
    assert {"lr", "stage-density.2"} <= set.intersection(*(set(run.data.params) for run in runs))


def mlflow_runs(out, name):
    """The child runs of a study's trials."""
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{out.resolve() / 'mlflow.db'}")
    (parent,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], f"attributes.run_name = '{name}'"
    )
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.role = 'trial'"
    return client.search_runs([parent.info.experiment_id], query)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"search": "criterium"}, "nothing called 'criterium'"),
        ({"search": "lr", "sampler": "threshold"}, "lr is a range"),
        ({"scheme": ["Prune", "StructPrune"], "sampler": "bisection"}, "bisection searches the density alone"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_made(task, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        ac.tune(task, out=tmp_path / "runs", **asked)
    assert not list(tmp_path.glob("runs/*/study.json"))


def test_auto_compares_schemes_by_size(strict, out):
    result = ac.tune(strict, scheme="auto", out=out, name="auto", trials=1, epochs=0.01, max_drop=0.0)
    asked = json.loads((result.folder / "study.json").read_text())
    assert (asked["scheme"], asked["objective"]) == ("auto", "size")
    assert list(result.trials["scheme"]) == [result.trials["scheme"][0]]
    assert result.trials["value"][0] == result.trials["size_bytes"][0]


def test_a_dense_model_that_predicts_one_class_is_noted(task):
    dense = task.evaluate(task.model, task.val)
    assert one_answer(dense, task) == ()
    constant = replace(dense, outputs=np.tile(np.eye(dense.outputs.shape[1])[1], (len(dense.targets), 1)))
    (note,) = one_answer(constant, task)
    assert note.startswith(f"the dense model predicts class 1 for each of the {len(dense.targets)} val samples")
    kinds = [f"kind {k}" for k in range(constant.outputs.shape[1])]
    named = ac.Task(task.model, task.train, task.val, task.test, classes=kinds)
    assert "predicts class kind 1 for" in one_answer(constant, named)[0]
    assert one_answer(replace(constant, targets=np.ones_like(dense.targets)), task) == ()


@pytest.mark.parametrize(("max_drop", "said"), [(0.02, 1), (0.5, 0)])
def test_what_the_test_data_can_certify_is_said_where_it_is_a_limit(task, max_drop, said):
    """A bound of 50 pp is kept by whatever models do that disagree on a sample in fifty."""
    settings = Settings((ac.parse_scheme("StructPrune"),), Bound(max_drop), (as_objective("density"),))
    assert len(prospect(settings, task)) == said
