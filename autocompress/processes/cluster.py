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

# If the scheduler is lost it logs a page of tracebacks; `ClusterWorkers.run` raises a one-line error.
logging.getLogger("distributed.client").setLevel(logging.CRITICAL)

CONNECT_S = 10
WAIT_FOR_WORKERS_S = 30


class ClusterWorkers:
    """Workers of a Dask cluster.

    If workers declare the resource GPU, each runs as many trials at a time as it has GPUs; otherwise each worker
    runs one. Workers that join later receive the shared objects, too, so that a worker that died can be restarted.
    Dask itself repeats a call whose worker died, as often as the scheduler's ``allowed-failures`` allows.

    Args:
        address: The address of the scheduler, such as ``tcp://scheduler:8786``.

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
            workers = self._checked_workers()
        except BaseException:
            self._client.close()
            raise
        gpus = sum(int(worker["resources"].get("GPU", 0)) for worker in workers)
        self.size = gpus or len(workers)
        self.hosts = len({worker["host"] for worker in workers})
        self.device = "cuda" if gpus else "cpu"
        self._executor = self._client.get_executor(pure=False, resources={"GPU": 1} if gpus else None)
        self._name = f"autocompress-{uuid.uuid4().hex}"
        self._opened = self._closed = False

    def _checked_workers(self) -> list[dict[str, Any]]:
        """Dask's description of each worker; ValueError if there are none, or their versions differ from ours."""
        try:
            self._client.wait_for_workers(1, timeout=WAIT_FOR_WORKERS_S)
            worker_versions = self._client.run(_versions)
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
        for worker, versions in worker_versions.items():
            if versions != _versions():
                pairs = "Python {}, autocompress {}".format
                raise ValueError(
                    f"the worker {worker} has {pairs(*versions)}, and this process {pairs(*_versions())}; install "
                    "the same there"
                )
        return list(self._client.scheduler_info(n_workers=-1)["workers"].values())

    def open(self, payload: bytes) -> None:
        """Sends the pickle of the shared objects to each worker, once."""
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
        """Disconnects from the cluster without waiting for running calls."""
        if self._closed:
            return
        self._closed = True
        self._executor.shutdown(wait=False)
        if self._opened and self._client.status == "running":
            self._client.unregister_worker_plugin(self._name)
        self._client.close()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# The code below runs in a worker.

_studies: dict[str, bytes | list[object]] = {}  # shared objects by study; pickled until they are first needed
_one_at_a_time = threading.Lock()  # trials seed torch's global generator, which threads share


class _Study(WorkerPlugin):  # type: ignore[misc]  # an extra: mypy does not look into it
    """Stores a study's shared objects in each worker, from when it joins until the study ends."""

    def __init__(self, name: str, payload: bytes) -> None:
        self.name, self.payload = name, payload

    def setup(self, worker: Worker) -> None:
        _studies[self.name] = self.payload

    def teardown(self, worker: Worker) -> None:
        _studies.pop(self.name, None)


def _versions() -> tuple[str, str]:
    """The versions of Python, on whose bytecode pickled functions depend, and of autocompress."""
    return ".".join(platform.python_version_tuple()[:2]), version("autocompress")


def _run_here(study: str, call: bytes) -> bytes:
    with _one_at_a_time:
        shared = _studies[study]
        if isinstance(shared, bytes):
            shared = _studies[study] = unpack_shared(shared)
        return run_packed(call, shared)
