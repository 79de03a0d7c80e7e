"""A Dask cluster as workers, on machines that share no files with this one. Needs the extra ``dask``."""

import logging
import platform
import threading
import uuid
from concurrent.futures import BrokenExecutor, CancelledError
from importlib.metadata import version
from typing import Any

from distributed import Client, KilledWorker, Worker, WorkerPlugin

from autocompress.processes.parcel import run_packed, unpack_shared

# Of a scheduler that is lost it logs a page of tracebacks, which is said here in a line.
logging.getLogger("distributed.client").setLevel(logging.CRITICAL)

CONNECT_S = 10
WAIT_FOR_WORKERS_S = 30


class ClusterWorkers:
    """Workers of a Dask cluster; those that declare the resource GPU run a trial for each, the others one.

    A worker that joins is given what all calls share, so that one that died can come back. A call whose worker
    died is put back by Dask itself, as often as the scheduler's ``allowed-failures`` says.

    Args:
        address: Of the scheduler, such as ``tcp://scheduler:8786``.

    Raises:
        ValueError: If there is no such cluster, it has no workers, or they have another version of autocompress.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self._client = Client(address, timeout=CONNECT_S, set_as_default=False, name="autocompress")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cluster={address!r} does not answer ({_first_line(error)}); begin one with: dask "
                "scheduler, and on each machine: dask worker tcp://SCHEDULER:8786 --nthreads 1"
            ) from error
        try:
            joined = self._joined()
        except BaseException:
            self._client.close()
            raise
        gpus = sum(int(one["resources"].get("GPU", 0)) for one in joined)
        self.size = gpus or len(joined)
        self.hosts = len({one["host"] for one in joined})
        self.device = "cuda" if gpus else "cpu"
        self._executor = self._client.get_executor(pure=False, resources={"GPU": 1} if gpus else None)
        self._name = f"autocompress-{uuid.uuid4().hex}"
        self._opened = self._closed = False

    def _joined(self) -> list[dict[str, Any]]:
        """What each worker has declared, once they are known to understand what they will be sent."""
        try:
            self._client.wait_for_workers(1, timeout=WAIT_FOR_WORKERS_S)
            there = self._client.run(_versions)
        except TimeoutError:
            raise ValueError(
                f"the cluster at {self.address} has no workers; begin some with: dask worker {self.address} "
                "--nthreads 1"
            ) from None
        except ImportError as error:
            raise ValueError(
                f"the workers of {self.address} lack something ({error}); install autocompress {_versions()[1]} "
                "there"
            ) from error
        for worker, versions in there.items():
            if versions != _versions():
                pairs = "Python {}, autocompress {}".format
                raise ValueError(
                    f"the worker {worker} has {pairs(*versions)}, and this process {pairs(*_versions())}; install "
                    "the same there"
                )
        return list(self._client.scheduler_info(n_workers=-1)["workers"].values())

    def open(self, payload: bytes) -> None:
        """Sends what all calls share to each worker, once."""
        self._client.register_plugin(_Study(self._name, payload))
        self._opened = True

    def run(self, call: bytes) -> bytes:
        """See `autocompress.processes.workers.Workers.run`."""
        try:
            outcome: bytes = self._executor.submit(_run_here, self._name, call).result()
        except KilledWorker as error:
            raise BrokenExecutor(f"its workers died, {error.allowed_failures + 1} times") from None
        except CancelledError:
            if self._closed:
                raise BrokenExecutor("the search has ended") from None
            raise RuntimeError(f"the cluster at {self.address} was lost; the study can be resumed") from None
        return outcome

    def close(self) -> None:
        """Lets go of the cluster; what its workers still run is not waited for."""
        if self._closed:
            return
        self._closed = True
        self._executor.shutdown(wait=False)
        if self._opened and self._client.status == "running":
            self._client.unregister_worker_plugin(self._name)
        self._client.close()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# What runs in a worker.

_studies: dict[str, bytes | list[object]] = {}
_one_at_a_time = threading.Lock()  # trials set torch's own random numbers


class _Study(WorkerPlugin):  # type: ignore[misc]  # an extra: mypy does not look into it
    """Keeps what all calls of a study share in each worker, from when it joins until the study ends."""

    def __init__(self, name: str, payload: bytes) -> None:
        self.name, self.payload = name, payload

    def setup(self, worker: Worker) -> None:
        _studies[self.name] = self.payload

    def teardown(self, worker: Worker) -> None:
        _studies.pop(self.name, None)


def _versions() -> tuple[str, str]:
    """Of Python, whose functions travel as its bytecode, and of autocompress."""
    return ".".join(platform.python_version_tuple()[:2]), version("autocompress")


def _run_here(study: str, call: bytes) -> bytes:
    with _one_at_a_time:
        shared = _studies[study]
        if isinstance(shared, bytes):
            shared = _studies[study] = unpack_shared(shared)
        return run_packed(call, shared)
