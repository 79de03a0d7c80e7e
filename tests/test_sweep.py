"""Sweeps: what the table says is what the models on disk do, and a sweep that was cut short goes on."""

import csv
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import autocompress as ac
from autocompress import sweeping
from autocompress.cli import cli
from autocompress.lc import LearningCompression
from autocompress.metrics import as_metric
from autocompress.schemes import Quantize16, StructPrune
from autocompress.sweeping import load_model
from autocompress.sweeps.sweep_files import write_sweep
from autocompress.sweeps.sweep_grid import distinct_schemes
from autocompress.sweeps.sweep_result import Sweep
from autocompress.task import Task
from autocompress.tracking import Tracker

QUICK = LearningCompression(epochs=2, c_steps=2, lr=0.05, score_steps=True)


def run(task: Task, out: Path, said: list[str] | None = None, **changes) -> Sweep:
    asked = {"schemes": ["StructPrune", "Quantize16"], "densities": (0.6, 0.3, 1e-6), "repeats": 2}
    asked |= {"also": ["sensitivity"], "recovery": QUICK, "timing": False, "name": "s"} | changes
    return ac.sweep(task, out=out, progress=(said if said is not None else []).append, **asked)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture
def found(tiny_task: Task, out: Path) -> Sweep:
    """One sweep for all that look at it."""
    if not (out / "s").exists():
        run(tiny_task, out)
    return Sweep.from_json(json.loads((out / "s" / "result.json").read_text()), out / "s")


def test_a_row_is_what_its_model_does(found: Sweep, tiny_task: Task) -> None:
    trials = found.trials
    assert list(trials["scheme"]) == ["dense", *2 * ["StructPrune", "StructPrune", "Quantize16"]]
    for _, row in trials.iterrows():
        model = load_model(found, row["number"], tiny_task)
        for split in ("val", "test"):
            seen = tiny_task.evaluate(model, getattr(tiny_task, split))
            assert row[f"accuracy_{split}"] == seen.score
            assert row[f"sensitivity_{split}"] == as_metric("sensitivity").score(seen.targets, seen.outputs)
    dense = sum(p.numel() for p in tiny_task.model.parameters())
    assert list(trials["params"] / dense) == pytest.approx(list(trials["density"]))
    assert (trials["density"] <= trials["density_asked"]).all()


def test_the_table_has_means_and_deviations_over_the_repeats(found: Sweep) -> None:
    trials, table = found.trials, found.table
    assert list(table["runs"]) == [1, 2, 2, 2]
    for scheme, density in (("StructPrune", 0.6), ("StructPrune", 0.3), ("Quantize16", 1.0)):
        runs = trials[(trials["scheme"] == scheme) & (trials["density_asked"] == density)]
        (row,) = (r for _, r in table.iterrows() if r["scheme"] == scheme and r["density_asked"] == density)
        assert row["accuracy"] == pytest.approx(np.mean(runs["accuracy_test"]))
        assert row["accuracy_sd"] == pytest.approx(np.std(runs["accuracy_test"], ddof=1))
        assert row["change"] == pytest.approx(row["accuracy"] - trials["accuracy_test"][0])
    assert np.isnan(table["accuracy_sd"][0])


def test_a_long_trial_says_how_far_it_has_come(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("autocompress.sweeping.SECONDS_BETWEEN_LINES", 0.0)
    run(tiny_task, tmp_path, said, schemes="StructPrune", densities=(0.5,), repeats=1)
    assert sum(line.startswith("trial   1  StructPrune") for line in said) > 2


def test_nothing_is_logged_beside_what_is_timed(
    tiny_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing MLflow and writing to it would take Python from the passes: milliseconds each."""
    told, done, seen = [], [], []  # to MLflow's thread, by it, and how many of each where something is timed

    def told_of(self: Tracker, call: Callable[[], None]) -> None:
        def slowly() -> None:
            time.sleep(0.05)
            call()
            done.append(call)

        told.append(call)
        enqueue(self, slowly)

    def looking(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append((len(told), len(done)))
            return work(*args, **kwargs)

        return run

    enqueue = Tracker._enqueue
    monkeypatch.setattr(Tracker, "_enqueue", told_of)
    monkeypatch.setattr(sweeping, "measure", looking(sweeping.measure))
    monkeypatch.setattr(sweeping, "run_trial", looking(sweeping.run_trial))
    run(tiny_task, tmp_path, schemes=["Quantize16"], timing=True, repeats=2)
    assert len(seen) == 3 and all(n_told == n_done > 0 for n_told, n_done in seen)


def test_what_cannot_be_reached_is_said_once(found: Sweep) -> None:
    (failed,) = found.failed
    assert (failed["scheme"], failed["density_asked"]) == ("StructPrune", 1e-6)
    assert "the lowest possible here is" in failed["reason"]


def test_the_files_say_the_same(found: Sweep) -> None:
    with (found.folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy_test"]) for row in rows] == list(found.trials["accuracy_test"])
    markdown = (found.folder / "sweep.md").read_text()
    header, table = found.to_rows()
    assert header[:3] == ["scheme", "density", "accuracy on test"] and "latency" not in header
    assert "StructPrune at density 1e-06" in markdown
    for row in table:
        assert f"| {' | '.join(row)} |" in markdown
    svg = (found.folder / "figures" / "sweep.svg").read_text()
    for word in (
        "StructPrune",
        "Quantize16",
        "sensitivity on test",
        "L-C step",
        "GPU memory and utilization: n/a",
        "measured on cpu, no GPU",
    ):
        assert word in svg
    assert (found.folder / "figures" / "sweep.png").stat().st_size > 10_000


def test_mlflow_has_a_run_for_each(found: Sweep) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{found.folder.parent}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "stripes")
    runs = client.search_runs([experiment.experiment_id])
    of_trials = {run.data.params["number"]: run for run in runs if run.data.tags["role"] == "trial"}
    assert len(of_trials) == 7 and len(runs) == 9  # with the dense model and the sweep itself; one has failed
    first = of_trials["1"].data
    assert first.params["scheme"] == "StructPrune" and first.params["repeat"] == "1"
    assert first.metrics["sensitivity_test"] == pytest.approx(found.trials["sensitivity_test"][1], abs=1e-5)


def test_a_metric_at_an_operating_point_is_in_the_table_and_in_mlflow(tiny_task: Task, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    asked, said = "specificity[1]@sensitivity=0.9", []
    found = run(tiny_task, tmp_path, said, schemes=["Quantize16"], repeats=1, also=[asked])
    assert not [line for line in said if "MLflow" in line]
    assert f"{asked} on test" in found.to_rows()[0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "stripes")
    runs = client.search_runs([experiment.experiment_id])
    (trial,) = (
        run for run in runs if run.data.params.get("scheme") == "Quantize16" and "repeat" in run.data.params
    )
    logged = trial.data.metrics["specificity_1__sensitivity_0.9_test"]
    assert logged == pytest.approx(found.trials[f"{asked}_test"][1], abs=1e-5)


def test_a_sweep_that_was_cut_short_goes_on(found: Sweep, tiny_task: Task, tmp_path: Path) -> None:
    shutil.copytree(found.folder, tmp_path / "s")
    (tmp_path / "s" / "result.json").unlink()
    (tmp_path / "s" / "trials" / "0005" / "cell.json").unlink()  # killed before the trial was whole
    said: list[str] = []
    again = run(tiny_task, tmp_path, said, name=None, resume="s")
    own = ["number", "scheme", "density", "accuracy_val", "accuracy_test"]
    assert again.trials[own].equals(found.trials[own])  # the same seeds, the same models
    taken = again.trials["seconds"] == found.trials["seconds"]
    assert list(again.trials["number"][~taken]) == [5]
    with pytest.raises(ValueError, match="was made with repeats 2, not 3"):
        run(tiny_task, tmp_path, name=None, resume="s", repeats=3)


def test_an_interrupt_keeps_what_there_is(tiny_task: Task, out: Path) -> None:
    """Its run in MLflow among it, though the first trial failed."""

    def progress(line: str) -> None:
        if line.startswith("trial   2"):
            raise KeyboardInterrupt

    settings = {"recovery": QUICK, "timing": False, "out": out, "progress": progress}
    found = ac.sweep(tiny_task, densities=(1e-6, 0.5, 0.3), **settings)
    assert found.interrupted and list(found.trials["number"]) == [0, 2]
    assert (found.folder / "sweep.md").is_file()
    assert json.loads((found.folder / "study.json").read_text())["mlflow_run"]


def test_a_gpu_is_drawn_over_time(found: Sweep, tmp_path: Path) -> None:
    seen = [[0.5 * i, 10**9 * (80 - i), 50.0 + i] for i in range(20)]
    cells = tuple({**cell, "timeline": seen if i else []} for i, cell in enumerate(found.cells))
    with_gpu = Sweep.from_json({**found.to_json(), "cells": cells, "device": "cuda:0"}, tmp_path)
    write_sweep(with_gpu)
    svg = (tmp_path / "figures" / "sweep.svg").read_text()
    assert "free GPU memory" in svg and "n/a" not in svg


def test_schemes_are_given_one_by_one_or_listed() -> None:
    listed = distinct_schemes(["Prune(skip=['a', 'b']), StructPrune+Quantize16", Quantize16()])
    assert list(listed) == ["Prune(skip=('a', 'b'))", "StructPrune+Quantize16", "Quantize16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemes": "Prune, Prune"}, "listed twice"),
        ({"schemes": ["Prune", "Prune()"]}, "listed twice"),
        ({"schemes": []}, "no scheme"),
        ({"densities": (0.5, 2)}, "above 0 and at most 1"),
        ({"densities": ()}, "one or more"),
        ({"densities": (0.5, 0.5)}, "given twice"),
        ({"repeats": 0}, "at least 1"),
        ({"also": ["sensitivty"]}, "did you mean sensitivity"),
        ({"also": ["auc", "auc"]}, "the metric 'auc' is asked for twice; name each once"),
        (
            {"also": ["accuracy"]},
            "the metric 'accuracy' is asked for twice; name each once, and the task's own not",
        ),
        ({"name": "cache"}, "name='cache'"),
        ({"schemes": [StructPrune(skip=["Conv2d", "Linear"])]}, "finds no channels"),
    ],
)
def test_bad_arguments_are_refused_at_once(tiny_task: Task, tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_task, tmp_path, **changes)
    assert not (tmp_path / "s").exists()


def test_bad_arguments_leave_no_folder(tiny_task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown scheme 'Prun'"):
        ac.sweep(tiny_task, schemes="Prun", densities=(0.5,), out=tmp_path / "runs")
    with pytest.raises(ValueError, match="unknown scheme 'Prun'"):
        ac.tune(tiny_task, scheme="Prun", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_there_is_not_is_refused_before_the_dense_model_is_trained(tmp_path: Path) -> None:
    def train() -> Task:
        raise AssertionError("the dense model is trained")

    with pytest.raises(ValueError, match="unknown metric 'sensitivty'"):
        run(train, tmp_path, also=["sensitivty"])  # type: ignore[arg-type]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    parts = {"train": 40, "val": 20, "test": 20}
    labels = {part: np.arange(n) % 2 for part, n in parts.items()}
    images = {part: rng.integers(0, 90, (len(y), 8, 8)) + 90 * y[:, None, None] for part, y in labels.items()}
    arrays = {f"{part}_images": images[part].astype(np.uint8) for part in parts}
    np.savez(tmp_path / "xray.npz", **arrays, **{f"{part}_labels": labels[part] for part in parts})
    monkeypatch.chdir(tmp_path)

    def typed(line: str, status: int = 0) -> str:
        done = CliRunner().invoke(cli, line.split(), standalone_mode=False)
        assert (done.return_value or getattr(done.exception, "exit_code", 0)) == status, done.output
        return done.output + str(done.exception or "")

    of_data = "--data xray.npz --train-epochs 1 --batch-size 20 --metric auc --also sensitivity"
    said = typed(f"sweep --scheme Prune --densities 50%,0.2 --epochs 1 {of_data} --name s")
    assert "trial   2  Prune  density 0.2" in said and "auc on test" in said and "latency" in said
    assert "sweep" in typed("list") and "auc on test" in typed("show s")
    assert "sweep.md" in typed("report s")
    again = json.loads(typed("sweep --resume s --json --quiet"))
    assert [cell["row"]["density_asked"] for cell in again["cells"]] == [1.0, 0.5, 0.2]
    assert "autocompress sweep --resume s" in typed("replay s")
    assert "is a sweep" in typed("tune --resume s", 2)
    assert "write 0.5,0.1" in typed("sweep --densities 1.5", 2)
