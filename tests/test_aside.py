import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from autocompress import study
from autocompress.processes.aside import Aside
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
    aside.prepare(give_back, lock)
    assert aside.call(give_back, lock) == (lock, os.getpid())


def test_the_functions_own_error_is_raised() -> None:
    def refuse() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        Aside().call(refuse)


@pytest.mark.slow
def test_a_study_is_ended_in_the_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[tuple[str, bool]] = []

    class Spied(Aside):
        def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            result = super().call(function, *args, **kwargs)
            there.append((function.__name__, self._process is not None))
            return result

    monkeypatch.setattr(study, "Aside", Spied)
    monkeypatch.setattr(study, "WORTH_S", 0.0)
    result = tune(out=tmp_path, trials=2, epochs=2, max_drop=0.5)
    assert [name for name, _ in there if name != "perform"] == ["export", "write_report"]
    assert all(is_there for _, is_there in there) and ("perform", True) in there  # MLflow is written there
    assert {one.format for one in result.exported.artifacts} == {"pt2", "onnx", "safetensors"}
    runtimes = {one.runtime for one in result.measurements["dense"].latency}
    assert runtimes == {"eager", "onnxruntime"}
    left = {path.name for path in result.folder.iterdir()}
    assert "report.html" in left and not any("onnx" in name for name in left)
