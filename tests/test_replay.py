import pytest

from autocompress.disk.storage import StudyFolder
from autocompress.experiments.replay import replay


@pytest.fixture(scope="module")
def study(recorded, tmp_path_factory):
    """A study that MLflow knows nothing of, with a failed trial."""
    trials = recorded.three_trials()
    result = recorded.found(trials, failed=[{"number": 4, "reason": "it diverged"}])
    return recorded.write_study(tmp_path_factory.mktemp("runs"), trials=trials, result=result)


def runs(home):
    from mlflow import MlflowClient

    uri = f"sqlite:///{home}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    return client, {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_everything_on_disk_is_logged_and_a_second_time_nothing_twice(study):
    run_id = replay(study)
    client, found = runs(study.parent)
    assert set(found) == {
        "demo",
        "dense",
        "trial 001 · 0.02",
        "trial 002 · 0.04",
        "trial 003 · 0.005",
        "trial 004 · failed",
    }
    parent = found["demo"]
    assert parent.info.run_id == run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"] == "Met on validation, not certifiable."
    assert parent.data.params["scheme"] == "StructPrune" and parent.data.params["recovery.epochs"] == "30.0"
    assert "provenance" not in parent.data.params
    assert parent.data.metrics["drop_upper_pp"] == 1.63
    assert parent.data.metrics["compressed_params"] == parent.data.metrics["params"] == 400
    assert {file.path for file in client.list_artifacts(run_id)} == {"result.json"}
    failed, beyond = found["trial 004 · failed"], found["trial 003 · 0.005"]
    assert failed.data.tags["reason"] == "it diverged"
    assert beyond.data.tags["reason"] == "loses 60.00 on val, which is beyond the bound"
    assert beyond.data.params["scheme"] == "StructPrune" and beyond.data.params["recovery.epochs"] == "30.0"

    assert replay(study) == run_id
    assert set(runs(study.parent)[1]) == set(found)


def test_a_study_without_a_result_or_in_use_is_refused(recorded, tmp_path):
    folder = recorded.write_study(tmp_path, "killed")
    with pytest.raises(ValueError, match="has no result yet; finish it with autocompress tune --resume killed"):
        replay(folder)
    held = StudyFolder(folder)
    with pytest.raises(ValueError, match="is being run by process"):
        replay(folder)
    held.close()


def test_when_mlflow_cannot_take_it_the_reason_is_raised(study):
    with pytest.raises(ValueError, match=r"^MLflow: http://127\.0\.0\.1:9 does not answer$"):
        replay(study, "http://me:secret@127.0.0.1:9")
