import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress import study
from autocompress.processes.aside import Aside, keep_loaded
from autocompress.tuning import tune


def give_back(value: object) -> tuple[object, int]:
    return value, os.getpid()


def test_calls_run_in_the_other_process_once_it_is_started() -> None:
    aside = Aside()
    try:
        assert aside.call(os.getpid) == os.getpid()
        aside.start()
        assert aside.call(os.getpid) != os.getpid()
        assert aside.call(torch.arange, 3).tolist() == [0, 1, 2]
    finally:
        aside.close()
    assert aside.call(os.getpid) == os.getpid()


def test_the_garbage_collector_does_not_look_at_what_the_process_has_loaded() -> None:
    aside = Aside()
    aside.start()
    try:
        before = aside.call(gc.get_freeze_count)  # some Pythons freeze a few of their own
        aside.call(keep_loaded)
        assert aside.call(gc.get_freeze_count) > before + 100_000  # torch and what else a call needs
        assert aside.is_there and gc.get_freeze_count() <= before
    finally:
        aside.close()


@pytest.mark.slow
def test_what_ends_the_process_runs_here() -> None:
    parent, aside = os.getpid(), Aside()

    def end_this_process() -> int:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    aside.start()
    assert aside.call(os.getpid) != parent
    assert aside.call(end_this_process) == parent
    assert aside.call(os.getpid) == parent


def test_what_cannot_travel_stays_here() -> None:
    aside, lock = Aside(), threading.Lock()
    aside.start()
    begun = aside.begin(give_back, lock)
    assert begun.outcome() == (lock, os.getpid()) and not aside.is_there


def test_the_functions_own_error_is_raised() -> None:
    def refuse() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        Aside().call(refuse)


@pytest.mark.slow
def test_a_study_is_ended_in_the_other_process_as_it_would_be_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    still_there = []

    class Spied(Aside):
        def begin(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            begun.append(function.__name__)
            return super().begin(function, *args, **kwargs)

        def close(self) -> None:
            still_there.append(self.is_there)
            super().close()

    class Alone(Aside):
        def start(self) -> None:
            pass

    asked: dict[str, Any] = {"trials": 2, "epochs": 2, "max_drop": 0.5, "name": "study"}
    monkeypatch.setattr(study, "WORTH_S", 0.0)
    monkeypatch.setattr(study, "Aside", Spied)
    result = tune(out=tmp_path / "beside", **asked)
    assert still_there[0]  # so nothing has failed there
    *ahead, last = (name for name in begun if name != "perform")  # MLflow is written there, too
    assert ahead[0] == "export_dense" and last == "write_report"
    assert set(ahead[1:]) == {"stage", "have_checker", "write_report"} and ahead.count("write_report") == 1
    assert {one.format for one in result.exported.artifacts} == {"pt2", "onnx", "safetensors"}
    runtimes = {one.runtime for one in result.measurements["dense"].latency}
    assert runtimes == {"eager", "onnxruntime"}
    left = {path.name for path in result.folder.iterdir()}
    assert "report.html" in left and not any(name.startswith(".ahead") for name in left)

    monkeypatch.setattr(study, "Aside", Alone)
    again = tune(out=tmp_path / "alone", **asked)
    assert {path.name: path.read_bytes() for path in (result.folder / "best").iterdir()} == {
        path.name: path.read_bytes() for path in (again.folder / "best").iterdir()
    }
