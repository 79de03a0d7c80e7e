"""Chooses where a study's trials run: in this process, in worker processes, or on a cluster."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from autocompress.gauges.devices import visible_gpus
from autocompress.processes.parcel import pack_shared
from autocompress.processes.workers import InProcess, LocalWorkers, Remote, Workers
from autocompress.studies.settings import Settings
from autocompress.task import Task

if TYPE_CHECKING:  # an extra
    from autocompress.processes.cluster import ClusterWorkers


class Workplace:
    """The place where the trials of a study run.

    Args:
        settings: The study's settings, with its workers, cluster and device.
        task: The task, its model on the study's device.

    Attributes:
        task: The task for the trials, its model on the CPU if they run in other processes.
        device: The device on which trials run.
        size: Number of trials that run at a time.

    Raises:
        ValueError: If the cluster cannot be used.
    """

    def __init__(self, settings: Settings, task: Task) -> None:
        self._settings = settings
        self._cluster = connect(settings.cluster) if settings.cluster else None
        self.device = self._cluster.device if self._cluster else settings.device
        self.size = self._cluster.size if self._cluster else settings.workers
        self._hosts = self._cluster.hosts if self._cluster else 1
        self._is_here = self._cluster is None and settings.workers == 1
        self.task = task if self._is_here else task.on("cpu")  # each worker has its own device

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on the accuracy of latencies, if several trials share a machine's CPU."""
        if self.size <= self._hosts or (self._settings.profile_device or self.device) != "cpu":
            return ()
        where = "one machine" if self._hosts == 1 else f"{self._hosts} machines"
        return (
            f"{self.size} trials at a time share {where}: what they measure of time is longer for it, and varies "
            "more; the answer is measured alone in the end",
        )

    def open(self, example: Mapping[str, object]) -> InProcess | Remote:
        """The executor of the trials.

        Args:
            example: The fields of any trial's spec, by name; the objects that trials share are sent to each worker
                once.
        """
        if self._is_here:
            return InProcess()
        shared, payload = pack_shared(example)
        return Remote(self._workers(payload), shared)

    def _workers(self, payload: bytes) -> Workers:
        if self._cluster is not None:
            self._cluster.open(payload)
            return self._cluster
        gpus = visible_gpus() if self.device != "cpu" else []
        threads = max(1, torch.get_num_threads() // self.size)
        return LocalWorkers(self.size, payload, threads=threads, gpus=gpus)

    def close(self) -> None:
        """Disconnects from the cluster, if there is one."""
        if self._cluster is not None:
            self._cluster.close()


def connect(address: str) -> "ClusterWorkers":
    """Connects to the Dask cluster at an address.

    Raises:
        ValueError: If it cannot be used, or Dask is not installed.
    """
    try:
        from autocompress.processes.cluster import ClusterWorkers
    except ImportError as error:
        raise ValueError(f"cluster={address!r} needs Dask ({error}); pip install 'autocompress[dask]'") from None
    return ClusterWorkers(address)
