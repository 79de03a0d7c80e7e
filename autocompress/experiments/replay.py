"""Logs a study to MLflow from its folder: after tracking has failed, or to another server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocompress.disk.files import called
from autocompress.disk.record import read_record
from autocompress.disk.storage import StudyFolder
from autocompress.experiments.mlflow_runs import Status
from autocompress.measurement import Measurement
from autocompress.report import FIGURES
from autocompress.search import INTERRUPTED
from autocompress.tracking import Tracker, final_metrics

_NOT_PARAMS = (
    "files",
    "formats",
    "provenance",
    "recovery",
    "mlflow_run",
    "tracking_uri",
    "autocompress",
    "timeout",
    "epochs_total",
    "dense_value",
    "storage",
    "study_id",
)


def replay(path: Path, uri: str | None = None) -> str:
    """Logs a study with all its trials; continues its MLflow run if there is one.

    The posterior after each trial and the machine's load are left out, as they are not stored in the folder.

    Args:
        path: The study's folder.
        uri: The tracking URI of a server; by default the database in the folder of all studies.

    Returns:
        The parent run's id.

    Raises:
        ValueError: If the study has no result yet, is being run, or MLflow fails.
    """
    folder = StudyFolder(path)
    try:
        return _replay(folder, uri)
    finally:
        folder.close()


def _replay(folder: StudyFolder, uri: str | None) -> str:
    record = read_record(folder.path, ours=True)
    asked, found = record.asked, record.found
    if record.kind == "sweep":
        raise ValueError(f"{record.name!r} is a sweep; autocompress sweep --resume {called(folder.path)} logs it")
    if found is None:
        remedy = f"finish it with autocompress tune --resume {called(folder.path)}"
        raise ValueError(f"the study {record.name!r} has no result yet; {remedy}")
    warned: list[str] = []
    tracker = Tracker(folder.path.parent, str(asked["task"]), uri=uri, meanwhile="", on_warning=warned.append)
    data = asked.get("provenance", {}).get("data")
    tracker.start(record.name, _params(asked), data=data, run_id=asked.get("mlflow_run"))
    dense = Measurement.from_json(found["measurements"]["dense"])
    tracker.dense(found["scores"]["dense"]["val"], dense, asked.get("dense_value", 1.0))
    for trial in record.trials:
        tracker.trial(folder.load_trial(trial["number"]))
    for number, reason in record.failed:
        tracker.failed(number, reason)
    names = ("result.json", "report.html", "report.md", FIGURES)
    files = [folder.path / name for name in names if (folder.path / name).exists()]
    status: Status = "KILLED" if found["stopped"] == INTERRUPTED else "FINISHED"
    file = folder.best / "model.pt2"
    model = file if "pt2" in found["artifacts"] and file.is_file() else None
    tracker.finish(status, found["sentence"], final_metrics(found), files, model)
    run_id = tracker.run_id
    if warned or run_id is None:
        raise ValueError(warned[0] if warned else "MLflow did not open a run")
    folder.update_settings({"mlflow_run": run_id})
    return run_id


def _params(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the parent run, the same as `autocompress.study.Study` logs."""
    recovery = {f"recovery.{name}": value for name, value in asked.get("recovery", {}).items()}
    return {name: value for name, value in asked.items() if name not in _NOT_PARAMS} | recovery
