"""Several coordinators of one study: real processes on a real PostgreSQL, or on SQLite where there is none."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autocompress.disk.database import check_database, connected
from autocompress.disk.files import write_json
from autocompress.disk.optuna_store import open_shared
from autocompress.disk.storage import StudyFolder
from autocompress.lc import LearningCompression
from autocompress.processes.workers import InProcess
from autocompress.schemes import StructPrune
from autocompress.search import Plan, add_dense, search
from autocompress.searching.samplers import make_sampler
from autocompress.searching.selection import finished
from autocompress.searching.space import Configuration, Space
from autocompress.trial import Bound, TrialResult, TrialSpec

BOUND, TRIALS = Bound(0.05), 5
QUICK = LearningCompression(epochs=1, c_steps=1, lr=0.05)
SPACE = Space((StructPrune(),), QUICK, (0.15,))
PASSWORD = "Pa55w0rd"
PROGRAMS = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a server, with user and password, that ends with the tests."""
    pytest.importorskip("psycopg", reason="the extra postgresql is not installed")
    programs = {name: shutil.which(name, path=PROGRAMS) for name in ("initdb", "postgres")}
    if None in programs.values():
        pytest.skip("this machine has no PostgreSQL: neither initdb nor postgres")
    home = Path(tempfile.mkdtemp(prefix="postgresql"))
    (home / "password").write_text(PASSWORD)
    user: dict[str, Any] = {"cwd": home}
    if os.getuid() == 0:  # as root it does not run
        shutil.chown(home, "nobody")
        user |= {"user": "nobody", "group": home.stat().st_gid, "extra_groups": []}
    initdb = [programs["initdb"], "-D", home / "data", "-U", "somebody", "-A", "scram-sha-256", "--no-sync"]
    subprocess.run([*initdb, "--pwfile", home / "password"], check=True, capture_output=True, **user)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["-D", home / "data", "-p", str(port), "-h", "127.0.0.1", "-k", home, "-F"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen([programs["postgres"], *options], stderr=log, **user)
    url = f"postgresql://somebody:{PASSWORD}@127.0.0.1:{port}/postgres"
    try:
        await_server(url)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        server.wait(30)
        shutil.rmtree(home, ignore_errors=True)


def await_server(url: str) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql"))
    return f"sqlite:///{tmp_path / 'study.db'}"


class Heard:
    """Notes the trials that it is told of."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def begins(self, number: int) -> None:
        pass

    def trial(self, result: TrialResult) -> None:
        with self.file.open("a") as file:
            file.write(f"{result.number}\n")

    def failed(self, number: int, reason: str) -> None:
        raise AssertionError(reason)


class DiesSaved(StudyFolder):
    """Has its process killed as soon as a trial is saved."""

    def save_trial(self, result: TrialResult) -> None:
        super().save_trial(result)
        os.kill(os.getpid(), signal.SIGKILL)


def coordinate(
    path: Path,
    url: str,
    make_spec: Callable[..., TrialSpec],
    name: str,
    dies_in: int = 0,
    in_folder: Callable[..., StudyFolder] = StudyFolder,
) -> None:
    """Takes part in a study; is killed in the trial of that number."""

    def spec(number: int, chosen: Configuration) -> TrialSpec:
        with (path / "ran").open("a") as file:
            file.write(f"{number} {name}\n")
        if number == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_spec(number, chosen.density, bound=BOUND, recovery=QUICK)

    folder = in_folder(path, shared=True)
    with connected(url) as database:
        with folder.turn():
            study = open_shared(database, path.name, "minimize")
            study.sampler = make_sampler("threshold", SPACE, BOUND.max_drop, 3)
            add_dense(study, SPACE, [1.0], BOUND)
        plan = Plan(SPACE, BOUND, TRIALS, tolerance=1e-6)
        search(study, plan, spec, InProcess(), folder, Heard(path / "heard"))
        assert len(finished(study)) == TRIALS  # it has waited for the others' last trials
    folder.close()


def forked(function: Callable[..., None], *arguments: Any) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the fork
def test_coordinators_share_the_trials_and_take_over_those_of_one_that_dies(
    tmp_path: Path, url: str, make_spec: Callable[..., TrialSpec]
) -> None:
    path = tmp_path / f"study-{tmp_path.name}"
    with connected(url):  # imports what takes a second
        pass
    for dies in (("first", 1), ("saved", 0, DiesSaved)):
        assert status_of(forked(coordinate, path, url, make_spec, *dies)) == -signal.SIGKILL
    others = [forked(coordinate, path, url, make_spec, name, dies) for name, dies in (("second", 3), ("third", 0))]
    statuses = [status_of(child) for child in others]
    ran = [line.split() for line in (path / "ran").read_text().splitlines()]
    assert statuses[1] == 0 and statuses[0] in (0, -signal.SIGKILL)
    numbers = [int(number) for number, _ in ran]
    assert set(numbers) == set(range(1, TRIALS + 1))
    again = [number for number in numbers if numbers.count(number) > 1]
    assert again.count(1) == 2  # only what was cut short, not what was saved
    assert len(again) == 2 * (1 + (statuses[0] != 0))
    heard = (path / "heard").read_text().split()  # what was saved by one that died, too, by whoever found it
    assert sorted(map(int, heard)) == list(range(1, TRIALS + 1))

    with connected(url) as database:
        trials = finished(open_shared(database, path.name, "minimize"))
    assert [trial.number for trial in trials] == list(range(1, TRIALS + 1))
    folder = StudyFolder(path, shared=True)
    for trial in trials:
        assert folder.load_trial(trial.number).density_asked == trial.params["density"]
    densities = sorted(trial.params["density"] for trial in trials)
    assert all(b / a > 1.01 for a, b in itertools.pairwise(densities))  # each saw what ran
    assert not list(path.glob("trials/*/lock"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the fork
def test_several_can_open_a_new_database_at_once(tmp_path: Path) -> None:
    with connected(f"sqlite:///{tmp_path}/another.db"):  # imports what takes a second
        pass
    at = time.monotonic() + 0.2

    def open_then() -> None:
        while time.monotonic() < at:
            pass
        with connected(f"sqlite:///{tmp_path}/study.db") as database:
            open_shared(database, str(os.getpid()), "minimize")

    assert [status_of(child) for child in [forked(open_then) for _ in range(3)]] == [0, 0, 0]


def test_a_trial_that_somebody_runs_is_nobody_elses(tmp_path: Path) -> None:
    one, other = StudyFolder(tmp_path, shared=True), StudyFolder(tmp_path, shared=True)
    assert one.claim(1) and not one.claim(1) and not other.claim(1) and other.claim(2)
    one.give_back(1)
    assert other.claim(1)
    one.close()
    other.close()


# Addresses


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://u:Pa55w0rd@host/db", "'mysql://host/db'; write postgresql://"),
        ("study.db", "'study.db'; write postgresql://"),
        ("postgresql://", "write postgresql://"),
        ("postgresql://u:Pa55@w0rd@host/db", "an @ in a user or password of an address is written %40"),
        ("postgresql://u:Pa55w0rd@host:port/db", "storage is not an address; write postgresql://"),
    ],
)
def test_what_is_no_address_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^storage") as refused:
        check_database(url)
    assert said in str(refused.value) and "Pa55" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_database_that_does_not_answer_is_said_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="the extra postgresql is not installed")
    for url in (f"postgresql://u:{PASSWORD}@127.0.0.1:9/db", f"sqlite:///{tmp_path}/nowhere/x.db"):
        with pytest.raises(ValueError, match=r"cannot be used: .*; see that it runs") as refused:
            connected(url).__enter__()
        assert PASSWORD not in str(refused.value) and "\n" not in str(refused.value)


# From the command line

TUNE = ("tune", "--epochs", "1", "--trials", "4", "--tolerance", "0.0001", "--quiet")


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from autocompress.cli import main; main()", *TUNE, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_database_that_is_lost_costs_no_finished_trial(tmp_path: Path, postgresql: str) -> None:
    """Its connections are cut while a trial runs, and it takes no new ones."""
    import psycopg

    process = start(tmp_path, "--name", "study", "--storage", postgresql)
    while not (tmp_path / "study" / "trials" / "0002").exists() and process.poll() is None:
        time.sleep(0.05)
    with psycopg.connect(postgresql.removesuffix("postgres") + "template1", autocommit=True) as admin:
        admin.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres'")
        said = process.communicate()
        admin.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS true")
    assert process.returncode == 1, said
    assert "was lost: " in said[1] and said[1].count("\n") == 1 and PASSWORD not in said[1], said
    assert (tmp_path / "study" / "trials" / "0001" / "trial.json").exists()
    again = start(tmp_path, "--resume", "study", "--storage", postgresql)
    said = again.communicate()
    assert again.returncode in (0, 3), said
    found = json.loads((tmp_path / "study" / "result.json").read_text())
    assert sorted(trial["number"] for trial in found["trials"]) == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_commands_run_one_study(tmp_path: Path, postgresql: str) -> None:
    """The second joins by --resume; both give the same answer, and nothing that is written holds the password."""
    first = start(tmp_path, "--name", "study", "--storage", postgresql)
    while not (tmp_path / "study" / "trials").exists() and first.poll() is None:
        time.sleep(0.1)
    second = start(tmp_path, "--resume", "study", "--storage", postgresql)
    said = [process.communicate() for process in (first, second)]
    assert first.returncode in (0, 3) and second.returncode == first.returncode, said
    # Columns are as wide as what each of them measured.
    answers = [
        [line.split() for line in out.splitlines() if "trial " in line or "density" in line] for out, _ in said
    ]
    assert answers[0] == answers[1]
    found = json.loads((tmp_path / "study" / "result.json").read_text())
    assert sorted(trial["number"] for trial in found["trials"]) == [1, 2, 3, 4]

    from autocompress.experiments.mlflow_store import open_store

    client, experiment = open_store(tmp_path, "digits")
    runs = client.search_runs([experiment])
    assert sorted(run.data.tags["role"] for run in runs) == ["dense", *["study"], *["trial"] * 4]

    wrong = postgresql.replace(PASSWORD, "not-it-at-all")
    refused = start(tmp_path, "--resume", "study", "--storage", wrong)
    said.append(refused.communicate())
    assert refused.returncode == 2 and "password authentication failed" in said[-1][1], said[-1]
    for written in ("".join(map("".join, said)), *(f.read_bytes().decode("latin-1") for f in files(tmp_path))):
        assert PASSWORD not in written and "not-it-at-all" not in written


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_study_stays_where_it_is_kept(tmp_path: Path, tiny_task: Any) -> None:
    import autocompress as ac

    (tmp_path / "study").mkdir()
    write_json(tmp_path / "study" / "study.json", {"kind": "study"})
    with pytest.raises(ValueError, match="'study' is kept in its folder and stays there; leave storage out"):
        ac.tune(tiny_task, out=tmp_path, resume="study", storage=f"sqlite:///{tmp_path}/x.db")
