"""Trials in processes of their own: the same results, and what happens when one dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from autocompress.gauges.devices import visible_gpus
from autocompress.goal import as_objective
from autocompress.plugins import load_from_file
from autocompress.processes.parcel import opened, pack, pack_shared, run_packed, unpack, unpack_shared
from autocompress.processes.workers import LocalWorkers, Remote
from autocompress.processes.workplace import Workplace
from autocompress.studies.settings import Settings
from autocompress.trial import TrialResult, TrialSpec, run_trial

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

MakeSpec = Callable[..., TrialSpec]

MODEL = """
import torch

class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 3)

    def forward(self, x):
        return 2 * self.inner(x)

def weight(measurement):
    return 3 * measurement.size_bytes
"""


def plain(result: TrialResult) -> TrialResult:
    """Without what differs from run to run."""
    return replace(result, model=None, seconds=0.0)


# What travels


def test_what_is_shared_travels_once(make_spec: MakeSpec) -> None:
    spec = make_spec()
    shared, payload = pack_shared(vars(spec))
    call = pack((run_trial, (spec,), {}), shared)
    assert len(call) < 2000 < 20_000 < len(payload)
    there = unpack_shared(payload)
    _, (arrived,), _ = unpack(call, there)
    assert arrived.task is there[shared.index(spec.task)]
    assert plain(opened(run_packed(call, there))) == plain(run_trial(spec))


def test_what_cannot_travel_is_named(make_spec: MakeSpec) -> None:
    spec = make_spec()
    spec.task.model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^task\.model cannot be sent to another process \(TypeError: .*lock"):
        pack_shared(vars(spec))


def test_a_function_that_uses_torchs_backends_travels() -> None:
    """They are modules of classes of their own, and a function of a script takes with it what it names."""

    def in_full_precision() -> Any:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.backends.cudnn

    assert unpack(pack(in_full_precision))() is torch.backends.cudnn


def test_what_cannot_be_made_again_is_said() -> None:
    with pytest.raises(ValueError, match=r"a worker cannot take the study over \(ModuleNotFoundError: .*nowhere"):
        unpack_shared(b"cnowhere\nthing\n.")


def test_errors_travel_whatever_they_hold() -> None:
    def fails() -> None:
        error = FloatingPointError("diverged")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    with pytest.raises(RuntimeError, match="FloatingPointError: diverged"):
        opened(run_packed(pack((fails, (), {})), []))


# The processes


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with Remote(LocalWorkers(2, pack([]), threads=1, gpus=["5", "7"]), []) as pool:
        yield pool


def who() -> tuple[int, str, int, signal.Handlers]:
    time.sleep(0.3)  # so that one worker cannot take both calls
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    return os.getpid(), gpu, torch.get_num_threads(), signal.getsignal(signal.SIGINT)  # type: ignore[return-value]


def test_each_worker_has_a_gpu_and_its_threads_and_leaves_ctrl_c_alone(pool: Executor) -> None:
    answers = [future.result() for future in [pool.submit(who), pool.submit(who)]]
    pids, gpus, threads, handlers = zip(*answers, strict=True)
    assert len({*pids, os.getpid()}) == 3
    assert sorted(gpus) == ["5", "7"]
    assert threads == (1, 1)
    assert handlers == (signal.SIG_IGN, signal.SIG_IGN)


def grow(n_bytes: int) -> int:
    sys.held = b"x" * n_bytes  # type: ignore[attr-defined]
    return os.getpid()


def test_a_worker_that_grows_is_not_taken_for_a_leak(pool: Executor) -> None:
    """loky looks at most once a second, after a call, for 300 MB more than there were after the first one."""
    before = {pool.submit(grow, 0).result() for _ in range(2)}
    time.sleep(1.1)
    grown = {pool.submit(grow, 350_000_000).result() for _ in range(2)}
    after = {pool.submit(grow, 0).result() for _ in range(2)}
    assert before == grown == after


def test_trials_in_workers_are_those_of_this_process(pool: Executor, make_spec: MakeSpec) -> None:
    specs = [make_spec(number, density) for number, density in ((1, 0.5), (2, 0.7), (3, 0.3))]
    for future, spec in zip([pool.submit(run_trial, spec) for spec in specs], specs, strict=True):
        there, here = future.result(), run_trial(spec)
        assert plain(there) == plain(here)
        assert there.model is not None and here.model is not None
        states = there.model.state_dict(), here.model.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_what_a_file_of_the_users_defines_needs_no_file_there(pool: Executor, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    made, objective = load_from_file(f"{file}:Scaled")(), as_objective(f"{file}:weight")
    file.unlink()
    there, name = pool.submit(lambda: (made.double(), objective.name)).result()
    assert isinstance(there, type(made)) and there.inner.weight.dtype == torch.float64
    assert name == "weight"


def take(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_a_killed_worker_costs_nobody_else_anything(
    pool: Executor, tmp_path: Path, die: Callable[..., str]
) -> None:
    """It is put back once; whoever dies twice has failed, and the other worker goes on with what it does."""
    before = pool.submit(take, 0.0).result(), pool.submit(take, 0.0).result()
    other, killed = pool.submit(take, 3.0), pool.submit(die, tmp_path / "marker")
    assert killed.result() == "done"
    assert other.result() in before
    with pytest.raises(BrokenExecutor, match="by SIGKILL, as a system that is out of memory does it, 2 times"):
        pool.submit(die).result()
    assert pool.submit(take, 0.0).result()


def test_an_executor_that_closes_ends_what_runs() -> None:
    pool = Remote(LocalWorkers(1, pack([]), threads=1), [])
    pid = pool.submit(take, 0.0).result()
    running = pool.submit(take, 60.0)
    began = time.monotonic()
    pool.shutdown()
    assert time.monotonic() - began < 10
    assert isinstance(running.exception(), BrokenExecutor)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


ORPHAN = """
import os, time
from autocompress.processes.parcel import pack
from autocompress.processes.workers import LocalWorkers, Remote

pool = Remote(LocalWorkers(1, pack([]), threads=1), [])
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 60)
time.sleep(60)
"""


def test_workers_end_with_a_coordinator_that_is_killed_and_need_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHAN)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as coordinator:
        assert coordinator.stdout is not None
        pid = int(coordinator.stdout.readline())
        coordinator.kill()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid)


def test_times_that_trials_take_from_each_other_are_said(make_spec: MakeSpec) -> None:
    spec = make_spec()

    def notes(**asked: Any) -> tuple[str, ...]:
        return Workplace(Settings((spec.scheme,), spec.bound, spec.objectives, **asked), spec.task).notes

    assert notes(workers=2)[0].startswith(
        "2 trials at a time share one machine: what they measure of time is longer"
    )
    assert notes() == notes(workers=2, profile_device="cuda") == ()


def test_gpus_are_named_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert visible_gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
