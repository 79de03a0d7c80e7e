"""Trials on a Dask cluster: processes of this machine that share nothing but sockets."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import autocompress as ac
from autocompress.lc import LearningCompression
from autocompress.processes.parcel import pack_shared
from autocompress.processes.workers import Remote
from autocompress.processes.workplace import connect
from autocompress.task import Task
from autocompress.trial import TrialSpec, run_trial

distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

# Dask's own threads and sockets outlive a closed cluster for a moment.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def made(n_workers: int, **options: Any) -> Any:
    return distributed.LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        host="127.0.0.1",
        silence_logs=50,
        **options,
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with made(2) as cluster:
        yield cluster


def found(result: ac.Result) -> list[tuple[Any, ...]]:
    """All that a trial came to but what is timed."""
    return sorted(
        (r.number, r.density_asked, r.density, r.score, r.values, r.feasible, *(one.met for one in r.constraints))
        for r in result.records
    )


def test_a_cluster_finds_what_the_pool_and_this_process_find(
    cluster: Any, tiny_task: Task, tmp_path: Path
) -> None:
    """With an objective in a file that workers do not have; the grid looks at no result, whatever their order."""
    mine = tmp_path / "mine.py"
    mine.write_text("def weight(measurement):\n    return 3 * measurement.size_bytes\n")
    asked: dict[str, Any] = {
        "max_drop": 0.5,
        "objective": ["density", f"{mine}:weight"],
        "constraints": ["size<=2.5kB", "latency<=5s", "f1>=0.1"],
        "sampler": "grid",
        "trials": 4,
        "recovery": LearningCompression(epochs=2, c_steps=2, lr=0.05),
        "device": "cpu",
    }
    here = ac.tune(tiny_task, out=tmp_path / "here", **asked)
    pool = ac.tune(tiny_task, out=tmp_path / "pool", workers=2, **asked)
    there = ac.tune(tiny_task, out=tmp_path / "there", cluster=cluster.scheduler_address, **asked)
    assert found(here) == found(pool) == found(there)
    assert {r.feasible for r in here.records} == {True, False}
    assert here.answer == pool.answer == there.answer is not None
    assert here.front == pool.front == there.front
    assert here.scores == pool.scores == there.scores


def test_a_sampler_that_looks_at_results_copes_with_those_of_a_cluster(
    cluster: Any, tiny_task: Task, tmp_path: Path
) -> None:
    """A model of several objectives and their limits, while another trial runs."""
    result = ac.tune(
        tiny_task,
        max_drop=0.5,
        objective=["size", "macs"],
        constraints=["size<=2.5kB"],
        trials=8,
        recovery=LearningCompression(epochs=1, c_steps=2, lr=0.05),
        device="cpu",
        out=tmp_path,
        cluster=cluster.scheduler_address,
    )
    assert len(result.records) == 8 and not result.failures
    assert result.answer in result.front


def test_a_worker_that_dies_costs_its_trial_at_most(
    tmp_path: Path, make_spec: Callable[..., TrialSpec], die: Callable[..., str]
) -> None:
    """Its successor is given the study, too."""
    spec = make_spec()
    shared, payload = pack_shared(vars(spec))
    with made(1) as cluster:
        workers = connect(cluster.scheduler_address)
        workers.open(payload)
        with Remote(workers, shared) as remote:
            assert remote.submit(die, tmp_path / "marker").result() == "done"
            assert remote.submit(run_trial, spec).result().score == run_trial(spec).score
            with pytest.raises(BrokenExecutor, match="its workers died, 4 times"):
                remote.submit(die).result()


def test_a_cluster_that_is_lost_is_said_in_one_line(make_spec: Callable[..., TrialSpec]) -> None:
    shared, payload = pack_shared(vars(make_spec()))
    with made(1) as cluster:
        workers = connect(cluster.scheduler_address)
        workers.open(payload)
        with Remote(workers, shared) as remote:
            running = remote.submit(time.sleep, 60)
            time.sleep(1)
            cluster.close()
            with pytest.raises(RuntimeError, match=r"the cluster at tcp://\S+ was lost; the study can be resumed"):
                running.result(30)


def test_workers_with_gpus_run_a_trial_for_each() -> None:
    with made(1, resources={"GPU": 2}) as cluster:
        workers = connect(cluster.scheduler_address)
        assert (workers.size, workers.device) == (2, "cuda")
        workers.close()


def test_a_cluster_that_is_not_there_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.processes.cluster.CONNECT_S", 1)
    monkeypatch.setattr("autocompress.processes.cluster.WAIT_FOR_WORKERS_S", 1)
    with pytest.raises(
        ValueError, match=r"cluster='tcp://127\.0\.0\.1:9' does not answer \(.*dask worker"
    ) as refused:
        connect("tcp://127.0.0.1:9")
    assert "\n" not in str(refused.value)
    with (
        made(0) as cluster,
        pytest.raises(ValueError, match=r"has no workers; begin some with: dask worker tcp://"),
    ):
        connect(cluster.scheduler_address)


def test_workers_and_a_cluster_exclude_each_other(tiny_task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers=2 are of this machine; with a cluster leave them out"):
        ac.tune(tiny_task, workers=2, cluster="tcp://127.0.0.1:9", out=tmp_path)
