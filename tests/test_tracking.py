import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.experiments.mlflow_store import check_uri, open_store, without_secrets
from autocompress.gauges.latency import Latency
from autocompress.measurement import Measurement
from autocompress.processes.aside import Aside
from autocompress.tracking import Tracker, metrics_of
from autocompress.trial import TrialResult

LATENCY = (Latency(1, 2.0, 2.5, 10), Latency(32, 16.0, 17.0, 10))
DENSE = Measurement(1.0, 1000, 4000, 50_000, "cpu", LATENCY)


def trial_result(number, density=0.25, feasible=True):
    return TrialResult(
        number=number,
        density_asked=density,
        density=density,
        score=0.95,
        drop=0.01,
        drop_se=0.002,
        feasible=feasible,
        values=(density,),
        seconds=2.5,
        measurement=Measurement(density, 250, 1000, 12_500, "cpu", LATENCY),
        plan={},
        curves={"loss": (0.9, 0.5, 0.3)},
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).eval()


@contextlib.contextmanager
def held_up(tracker):
    """Stops the tracker's thread for as long as the block takes; fails if the block waits for it."""
    goes_on = threading.Event()
    was_in_time = tracker._worker.submit(goes_on.wait, 60)
    yield
    goes_on.set()
    assert was_in_time.result()


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """`network` as a torch.export file."""
    file = tmp_path_factory.mktemp("best") / "model.pt2"
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(network(), (torch.zeros(5, 1, 8, 8),), dynamic_shapes=({0: batch},))
    program.example_inputs = None  # as in what a study ships
    torch.export.save(program, file)
    return file


SPLITS = {"train": {"n": 8, "sha256": None}, "test": {"n": 8, "sha256": "ab" * 32}}


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory):
    """A database without runs: making one takes seconds, a copy finds its way by itself."""
    out = tmp_path_factory.mktemp("template") / "runs"
    open_store(out, "digits")
    return out / "mlflow.db"


@pytest.fixture
def out(tmp_path, fresh_database):
    out = tmp_path / "runs"
    out.mkdir()
    shutil.copy(fresh_database, out)
    return out


@pytest.fixture
def refuse():
    """Collects warnings; there must be none."""
    warned = []
    yield warned.append
    assert warned == []


@pytest.fixture
def tracker(out, refuse):
    tracker = Tracker(out, "digits", on_warning=refuse)
    tracker.start("study", {"scheme": "Prune", "seed": 0, "max_drop": 0.01}, {"kind": "test"}, data=SPLITS)
    return tracker


def client(out):
    from mlflow import MlflowClient

    uri = f"sqlite:///{out}/mlflow.db"
    return MlflowClient(uri, registry_uri=uri)


def runs(out, experiment="digits"):
    """The experiment's runs by name."""
    found = client(out).get_experiment_by_name(experiment)
    listed = client(out).search_runs([found.experiment_id], order_by=["attributes.start_time"])
    return {run.info.run_name: run for run in listed}


def test_a_study_is_a_parent_run_with_one_child_per_trial(out, tracker):
    tracker.dense(0.96, DENSE, value=1.0, seconds=0.1)
    tracker.trial(trial_result(0, 0.25), best_density=0.25, posterior={"q50": 0.2, "q90": 0.22})
    given_up = replace(trial_result(1, 0.125, feasible=False), given_up_at=0.5)
    tracker.trial(given_up, best_density=0.25, posterior={"q50": 0.21, "q90": 0.22})
    tracker.failed(2, "the worker died")
    tracker.finish("FINISHED", "4 times smaller, certified.", {"compressed_density": 0.25, "dense_density": 1.0})

    found = runs(out)
    first, second = "trial 000 · 0.25", "trial 001 · 0.125"
    assert set(found) == {"study", "dense", first, second, "trial 002 · failed"}
    parent = found.pop("study")
    assert parent.info.run_id == tracker.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"scheme": "Prune", "seed": "0", "max_drop": "0.01"}
    assert parent.data.tags["kind"] == "test"
    assert parent.data.tags["mlflow.note.content"] == "4 times smaller, certified."
    assert parent.data.metrics["compressed_density"] == parent.data.metrics["density"] == 0.25
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {tracker.run_id}
    history = client(out).get_metric_history(tracker.run_id, "posterior/q50")
    assert [(m.step, m.value) for m in history] == [(0, 0.2), (1, 0.21)]

    child = found[first]
    inherited = {"scheme": "Prune", "seed": "0", "max_drop": "0.01"}
    assert child.data.params == {**inherited, "number": "0", "density_asked": "0.25"}
    assert child.data.tags["feasible"] == "true"
    assert child.data.tags["state"] == "complete"
    assert child.data.metrics["drop_pp"] == 1.0
    assert child.data.metrics["latency_ms"] == 2.0
    assert child.data.metrics["throughput_per_s"] == 2000.0
    assert child.info.end_time - child.info.start_time == pytest.approx(2500, abs=500)
    assert [m.value for m in client(out).get_metric_history(child.info.run_id, "recovery/loss")] == [
        0.9,
        0.5,
        0.3,
    ]
    assert found[second].data.metrics["feasible"] == 0.0
    assert found[second].data.tags["state"] == "rejected"
    assert found[second].data.tags["reason"].startswith("given up early: ")
    assert set(found["dense"].data.metrics) == set(child.data.metrics) - {"recovery/loss"}
    assert found["dense"].data.tags["role"] == "dense"
    (dense,) = found["dense"].outputs.model_outputs
    for run in (parent, child, found[second], found["trial 002 · failed"]):
        assert [m.model_id for m in client(out).get_run(run.info.run_id).inputs.model_inputs] == [dense.model_id]
    assert {m.key: m.value for m in client(out).get_logged_model(dense.model_id).metrics}["params"] == 1000
    assert found["trial 002 · failed"].info.status == "FAILED"


def test_the_data_are_logged_by_name_and_count(out, tracker):
    tracker.finish()
    inputs = runs(out)["study"].inputs.dataset_inputs
    assert {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs} == {
        ("digits train", "n=8", "train"),
        ("digits test", "ab" * 8, "test"),
    }


def test_artifacts_and_the_winner_are_kept_without_pickle_and_load_again(out, tracker, tmp_path, exported):
    report = tmp_path / "result.json"
    report.write_text("{}")
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "curve.svg").write_text("<svg/>")
    model, x = network(), torch.randn(5, 1, 8, 8)
    start = time.perf_counter()
    tracker.finish(
        metrics=metrics_of(0.95, DENSE, "compressed_"),
        artifacts=[report, figures],
        model=exported,
    )
    assert time.perf_counter() - start < 30

    store = client(out)
    assert {file.path for file in store.list_artifacts(tracker.run_id)} == {"result.json", "figures"}
    run = store.get_run(tracker.run_id)
    (output,) = run.outputs.model_outputs
    logged = store.get_logged_model(output.model_id)
    assert logged.status == "READY"
    assert logged.source_run_id == tracker.run_id
    assert {metric.key for metric in logged.metrics} == set(metrics_of(0.95, DENSE, "compressed_"))

    import mlflow.pytorch

    with torch.no_grad():
        expected = model(x)
        loaded = mlflow.pytorch.load_model(logged.artifact_location)
        torch.testing.assert_close(loaded(x), expected)
    served = mlflow.pyfunc.load_model(logged.artifact_location)
    signature = served.metadata.signature
    assert [(spec.type.name, spec.shape) for spec in signature.inputs] == [("float32", (-1, 1, 8, 8))]
    assert [(spec.type.name, spec.shape) for spec in signature.outputs] == [("float32", (-1, 10))]
    np.testing.assert_allclose(served.predict(x.numpy()), expected.numpy(), rtol=1e-5, atol=1e-6)
    files = {path.name for path in Path(logged.artifact_location.removeprefix("file://")).rglob("*")}
    assert "MLmodel" in files
    assert not any(name.endswith((".pkl", ".pth")) for name in files)
    assert not list(out.glob(".mlflow-*"))


def test_a_model_that_cannot_be_read_costs_one_warning_and_nothing_else(out, tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no program")
    warned = []
    tracker = Tracker(out, "digits", on_warning=warned.append)
    tracker.start("study", {})
    tracker.finish(verdict="done", model=tmp_path / "model.pt2")
    assert len(warned) == 1
    assert runs(out)["study"].info.status == "FINISHED"
    assert runs(out)["study"].data.tags["mlflow.note.content"] == "done"


def test_a_resumed_study_goes_on_in_its_run_without_duplicates(out, tracker, refuse):
    tracker.dense(0.96, DENSE, value=1.0)
    tracker.trial(trial_result(0))
    tracker.failed(1, "the worker died")
    tracker.finish("KILLED")
    run_id = tracker.run_id

    resumed = Tracker(out, "digits", device="cpu", on_warning=refuse)
    resumed.start("study", {"scheme": "Prune", "seed": 0, "max_drop": 0.02}, run_id=run_id)
    resumed.flush()
    assert resumed.run_id == run_id
    assert runs(out)["study"].info.status == "RUNNING"
    resumed.dense(0.96, DENSE, value=1.0)
    for number in range(3):
        resumed.trial(trial_result(number))
    resumed.finish()
    assert runs(out)["study"].info.status == "FINISHED"
    everything = client(out).search_runs([client(out).get_experiment_by_name("digits").experiment_id])
    assert sorted(run.info.run_name for run in everything) == [
        "dense",
        "study",
        *(f"trial 00{number} · 0.25" for number in range(3)),
    ]


def test_a_parent_run_that_is_gone_is_begun_anew(out, tracker, refuse):
    tracker.finish()
    again = Tracker(out, "digits", on_warning=refuse)
    again.start("study", {}, run_id="0" * 32)
    again.finish()
    assert again.run_id not in (None, tracker.run_id, "0" * 32)


def test_an_experiment_deleted_in_the_ui_comes_back(out, tracker, refuse):
    tracker.finish()
    client(out).delete_experiment(client(out).get_experiment_by_name("digits").experiment_id)
    again = Tracker(out, "digits", on_warning=refuse)
    again.start("second", {})
    again.finish()
    assert "second" in runs(out)


def test_a_directory_that_was_moved_takes_its_artifacts_along(out, tracker, tmp_path, refuse):
    tracker.finish(artifacts=[Path(__file__)])
    moved = out.rename(tmp_path / "moved")
    again = Tracker(moved, "digits", on_warning=refuse)
    again.start("second", {})
    again.finish(artifacts=[Path(__file__)])
    for run_id in (tracker.run_id, again.run_id):
        assert [file.path for file in client(moved).list_artifacts(run_id)] == [Path(__file__).name]
    assert not out.exists()


def damaged(out):
    out.mkdir()
    (out / "mlflow.db").write_bytes(b"not a database at all" * 100)


def foreign(out):
    out.mkdir()
    sqlite3.connect(out / "mlflow.db").execute("CREATE TABLE other (x)").connection.close()


def directory(out):
    (out / "mlflow.db").mkdir(parents=True)


def taken(out):
    out.write_text("a file where the directory should be")


@pytest.mark.parametrize("break_it", [damaged, foreign, directory, taken])
def test_a_broken_store_costs_one_warning_and_no_time(tmp_path, break_it):
    out = tmp_path / "broken"
    break_it(out)
    warned = []
    start = time.perf_counter()
    tracker = Tracker(out, "digits", on_warning=warned.append)
    tracker.start("study", {})
    tracker.dense(0.96, DENSE, value=1.0)
    tracker.trial(trial_result(0))
    tracker.finish(model=Path(__file__))
    assert tracker.run_id is None
    assert time.perf_counter() - start < 5
    assert len(warned) == 1
    assert warned[0].startswith("MLflow: ")
    assert "\n" not in warned[0]


def test_calls_return_at_once_and_a_database_lost_on_the_way_is_survived(out):
    warned = []
    tracker = Tracker(out, "digits", on_warning=warned.append)
    with held_up(tracker):
        tracker.start("study", {})
        for number in range(3):
            tracker.trial(trial_result(number))
    tracker.flush()
    (out / "mlflow.db").write_bytes(b"overwritten" * 1000)
    for number in range(3, 9):
        tracker.trial(trial_result(number))
    tracker.finish()
    assert len(warned) == 1


def test_nothing_is_written_before_it_is_decided_from_where(out, refuse):
    tracker = Tracker(out, "digits", aside=Aside(), on_warning=refuse)
    tracker.start("study", {})
    time.sleep(0.1)
    assert tracker.run_id is None and not runs(out)
    tracker.proceed()
    tracker.flush()
    assert runs(out)["study"].info.run_id == tracker.run_id
    tracker.finish()


@pytest.mark.slow
def test_a_process_beside_the_study_that_dies_costs_no_run_and_leaves_none_twice(out, refuse):
    aside = Aside()
    aside.start()
    tracker = Tracker(out, "digits", aside=aside, on_warning=refuse)
    try:
        tracker.start("study", {"scheme": "Prune"})
        tracker.trial(trial_result(0))
        tracker.flush()
        os.kill(aside.call(os.getpid), signal.SIGKILL)
        half = client(out).create_run(runs(out)["study"].info.experiment_id, tags={"role": "trial"})
        for key, value in (("mlflow.parentRunId", tracker.run_id), ("role", "trial")):
            client(out).set_tag(half.info.run_id, key, value)
        client(out).log_param(half.info.run_id, "number", 1)  # as it would lie there, had it died as it wrote
        tracker.trial(trial_result(0))
        tracker.trial(trial_result(1))
        tracker.finish()
        assert aside.call(os.getpid) != os.getpid()
    finally:
        aside.close()
    everything = client(out).search_runs([client(out).get_experiment_by_name("digits").experiment_id])
    assert sorted(run.info.run_name for run in everything) == ["study", "trial 000 · 0.25", "trial 001 · 0.25"]
    assert {run.info.status for run in everything} == {"FINISHED"}


def test_a_study_that_ended_before_it_began_writes_nothing_and_after_that_nothing_raises(tmp_path):
    warned = []
    tracker = Tracker(tmp_path / "runs", "digits", on_warning=warned.append)
    tracker.finish()
    assert not warned and not (tmp_path / "runs").exists()
    tracker.trial(trial_result(0))
    tracker.finish()
    assert len(warned) == 1


def test_an_empty_file_left_by_a_crash_is_not_a_database(tmp_path, refuse):
    out = tmp_path / "empty"
    out.mkdir()
    (out / "mlflow.db").touch()
    (out / "mlflow.db.new").write_bytes(b"half")
    tracker = Tracker(out, "digits", on_warning=refuse)
    tracker.start("study", {})
    tracker.finish()
    assert "study" in runs(out)


STUDY = """
import sys
from pathlib import Path
from autocompress.experiments.mlflow_store import check_uri, without_secrets
from autocompress.tracking import Tracker
out, experiment, name = sys.argv[1:]
tracker = Tracker(Path(out), experiment, on_warning=lambda message: sys.exit(message))
tracker.start(name, {"scheme": "Prune"})
for number in range(3):
    tracker.failed(number, "no reason")
tracker.finish(artifacts=[Path(__file__)])
"""


def test_four_studies_start_at_once_and_write_nothing_elsewhere(tmp_path, warm):
    cwd, home, scratch = tmp_path / "cwd", tmp_path / "home", tmp_path / "tmp"
    for path in (cwd, home, scratch):
        path.mkdir()
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    started = [warm.start([str(script), "runs", "shared", f"study {i}"], cwd, environment) for i in range(4)]
    said = [process.stdout.read() + process.stderr.read() for process in started]
    assert [process.wait() for process in started] == [0] * 4, said
    for process in started:
        process.close()
    assert said == [""] * 4

    found = client(cwd / "runs")
    experiment = found.get_experiment_by_name("shared")
    assert len(found.search_runs([experiment.experiment_id])) == 4 * (1 + 3)
    assert [path.name for path in cwd.iterdir()] == ["runs"]
    assert {path.name for path in (cwd / "runs").iterdir()} == {
        "mlflow.db",
        "mlflow.db.lock",
        "mlflow-artifacts",
    }
    assert list(home.iterdir()) == []
    assert list(scratch.iterdir()) == []


def test_a_path_that_mlflow_cannot_use_is_refused_at_once(tmp_path):
    warned = []
    tracker = Tracker(tmp_path / "100%", "digits", on_warning=warned.append)
    tracker.start("study", {})
    tracker.finish()
    assert "'%' in the path" in warned[0]
    shutil.rmtree(tmp_path / "100%")
    assert list(tmp_path.iterdir()) == []


def test_the_winner_is_registered_under_a_name(out, tracker, exported):
    tracker.finish(model=exported, register="small")
    (version,) = client(out).search_model_versions("name='small'")
    assert version.run_id == tracker.run_id
    (output,) = client(out).get_run(tracker.run_id).outputs.model_outputs
    assert version.source == client(out).get_logged_model(output.model_id).artifact_location


def test_a_server_that_does_not_answer_is_said_once_in_short_and_without_the_password(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    warned = []
    tracker = Tracker(tmp_path, "digits", uri=f"http://me:secret@127.0.0.1:{port}", on_warning=warned.append)
    with held_up(tracker):
        tracker.start("study", {})
        tracker.trial(trial_result(0))
    tracker.finish()
    assert warned == [
        f"MLflow: http://127.0.0.1:{port} does not answer (the study goes on; its own directory has everything)"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://host:5000/x"),
        ("failed for postgresql+psycopg://me:s@host/db, sorry", "failed for postgresql+psycopg://host/db, sorry"),
        ("https://host/?token=abc&x=1", "https://host/?token=...&x=1"),
        ("https://host/?x=1&api_key=abc'", "https://host/?x=1&api_key=...'"),
        ("postgresql://me:p@ss/word@host/db", "postgresql://host/db"),
        ("write to me@example.org, see http://host:5000", "write to me@example.org, see http://host:5000"),
    ],
)
def test_what_is_secret_in_an_address_is_left_out(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize("uri", ["http://host:5000", "https://host", "sqlite:///mlflow.db", "databricks"])
def test_addresses_that_mlflow_can_use(uri):
    assert check_uri(uri) == uri


@pytest.mark.parametrize("uri", ["host:5000", "ftp://me:secret@host", "", "./mlruns"])
def test_other_addresses_are_refused_without_the_password(uri):
    with pytest.raises(ValueError, match="is not a tracking URI") as caught:
        check_uri(uri)
    assert "secret" not in str(caught.value)
