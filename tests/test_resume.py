"""A study that was killed goes on as if nothing had happened: real kills of real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress.disk.optuna_store import open_study
from autocompress.disk.storage import StudyFolder
from autocompress.lc import LearningCompression
from autocompress.processes.workers import InProcess
from autocompress.schemes import StructPrune
from autocompress.search import Plan, add_dense, adopt, search
from autocompress.searching.samplers import make_sampler
from autocompress.searching.selection import finished
from autocompress.searching.space import Configuration, Space
from autocompress.trial import Bound, TrialSpec

BOUND = Bound(0.05)
LOW = 0.15
TRIALS = 3
QUICK = LearningCompression(epochs=1, c_steps=1, lr=0.05)
SPACE = Space((StructPrune(),), QUICK, (LOW,))


class Quiet:
    """Hears nothing."""

    def begins(self, number: int) -> None:
        pass

    def trial(self, result: object) -> None:
        pass

    def failed(self, number: int, reason: str) -> None:
        raise AssertionError(reason)


def run_study(path: Path, make_spec: Callable[..., TrialSpec], sampler: str) -> None:
    """Begins the study, or goes on with it."""
    folder = StudyFolder(path)
    study = open_study(folder.journal_file, "minimize")
    study.sampler = make_sampler(sampler, SPACE, BOUND.max_drop, 3)
    add_dense(study, SPACE, [1.0], BOUND)
    adopt(study, BOUND, folder)

    def spec(number: int, chosen: Configuration) -> TrialSpec:
        return make_spec(number, chosen.density, bound=BOUND, recovery=QUICK)

    search(study, Plan(SPACE, BOUND, TRIALS), spec, InProcess(), folder, Quiet())
    folder.close()


def outcome(path: Path) -> list[tuple[Any, ...]]:
    """All that the trials found."""
    folder, study = StudyFolder(path), open_study(path / "journal.log")
    assert {trial.state.name for trial in study.trials} == {"COMPLETE"}
    found = []
    for trial in finished(study):
        record = replace(folder.load_trial(trial.number), seconds=0.0)
        attributes = {k: v for k, v in trial.user_attrs.items() if k != "seconds"}
        weights = {name: tensor.tolist() for name, tensor in folder.load_weights(trial.number).items()}
        found.append((trial.number, trial.params, trial.value, attributes, trial.constraints, record, weights))
    folder.close()
    return found


def killed_at(event: int, run: Callable[[], None]) -> bool:
    """Runs in a fork that kills itself at its ``event``-th change to the file system; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = [event]

        def count(name: str, arguments: tuple[Any, ...]) -> None:
            writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or name in ("os.rename", "os.remove", "os.mkdir", "os.truncate"):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the fork
@pytest.mark.parametrize("sampler", ["threshold", "random"])
def test_a_search_killed_whenever_it_writes_ends_as_if_it_had_not_been(
    sampler: str, tmp_path: Path, make_spec: Callable[..., TrialSpec]
) -> None:
    """One kill after another, each a few writes later than the last: with ask, tell and the files in between."""
    run_study(tmp_path / "whole", make_spec, sampler)
    kills, event = 0, 2
    while killed_at(event, lambda: run_study(tmp_path / "killed", make_spec, sampler)):
        kills, event = kills + 1, event + 5
    run_study(tmp_path / "killed", make_spec, sampler)
    assert kills >= 5
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_half_a_line_in_the_journal_is_taken_back(tmp_path: Path, make_spec: Callable[..., TrialSpec]) -> None:
    run_study(tmp_path / "whole", make_spec, "random")
    run_study(tmp_path / "cut", make_spec, "random")
    journal = tmp_path / "cut" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # the last tell
    run_study(tmp_path / "cut", make_spec, "random")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


# From the command line

TUNE = ("tune", "--epochs", "1", "--trials", "3", "--sampler", "random", "--quiet")


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from autocompress.cli import main; main()", *TUNE, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result_of(out: Path) -> dict[str, Any]:
    found = json.loads((out / "study" / "result.json").read_text())
    keep = ("verdict", "density", "answer", "scores", "params", "size_bytes", "certificate", "failed")
    trials = [{k: v for k, v in row.items() if k != "seconds"} for row in found["trials"]]
    return {"trials": trials, **{key: found[key] for key in keep}}


@pytest.mark.slow
def test_a_study_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Twenty kills, anywhere from the training of the dense model to the report."""
    began = time.monotonic()
    whole = start(tmp_path / "whole", "--name", "study")
    _, errors = whole.communicate()
    assert whole.returncode in (0, 3), errors
    lasts = time.monotonic() - began
    moments, kills = random.Random(0), 0
    while kills < 20:
        known = (tmp_path / "killed" / "study" / "study.json").exists()
        with start(tmp_path / "killed", "--resume" if known else "--name", "study") as process:
            try:
                process.wait(moments.uniform(0.1, 1.0) * lasts)
                break  # it has reached its end between two kills
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
    done = start(tmp_path / "killed", "--resume", "study")
    _, errors = done.communicate()
    assert done.returncode in (0, 3), errors
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_a_cluster_sends_ends_a_study_in_time_and_saves_it(tmp_path: Path, workers: str) -> None:
    """A study with more trials than it can finish, which nobody else can run meanwhile."""
    process = start(tmp_path, "--name", "study", "--trials", "1000", "--workers", workers)
    first = tmp_path / "study" / "trials" / "0001" / "trial.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.1)
    second = start(tmp_path, "--resume", "study")
    _, errors = second.communicate()
    assert second.returncode == 2
    assert f"the study 'study' is being run by process {process.pid} on " in errors
    process.terminate()
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 30 * 4  # here on a machine that may be busy
    found = json.loads((tmp_path / "study" / "result.json").read_text())
    assert found["stopped"] == "interrupted" and found["trials"]


@pytest.mark.slow
def test_four_studies_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    names = [f"study-{i}" for i in range(4)]
    processes = [start(tmp_path, "--name", name) for name in names]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, 3), errors
        assert "MLflow" not in errors
    from autocompress.experiments.mlflow_store import open_store

    client, experiment = open_store(tmp_path, "digits")
    runs = client.search_runs([experiment], max_results=100)
    parents = [run for run in runs if run.data.tags["role"] == "study"]
    assert sorted(run.info.run_name for run in parents) == names
    assert {run.info.status for run in runs} == {"FINISHED"}
    for parent in parents:
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) == 4  # the dense model and three trials
