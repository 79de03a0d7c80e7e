"""Where a study's trials run: in this process, in processes of this machine, or on a cluster."""

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
    """Where the trials of a study run.

    Args:
        settings: What is asked: the workers, the cluster, the device.
        task: The task, its model on the study's device.

    Attributes:
        task: The task as the trials get it.
        device: On which they run.
        size: How many at a time.

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
        self.task = task if self._is_here else task.on("cpu")  # each worker has a device of its own

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the times that trials measure: one sentence or none."""
        if self.size <= self._hosts or (self._settings.profile_device or self.device) != "cpu":
            return ()
        where = "one machine" if self._hosts == 1 else f"{self._hosts} machines"
        return (
            f"{self.size} trials at a time share {where}: what they measure of time is longer for it, and varies "
            "more; the answer is measured alone in the end",
        )

    def open(self, example: Mapping[str, object]) -> InProcess | Remote:
        """Where to submit trials.

        Args:
            example: The parts of one trial, by name: what all have in common is sent to each worker once.
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
        """Lets the cluster go."""
        if self._cluster is not None:
            self._cluster.close()


def connect(address: str) -> "ClusterWorkers":
    """The workers of the cluster at that address.

    Raises:
        ValueError: If it cannot be used, or Dask is not installed.
    """
    try:
        from autocompress.processes.cluster import ClusterWorkers
    except ImportError as error:
        raise ValueError(f"cluster={address!r} needs Dask ({error}); pip install 'autocompress[dask]'") from None
    return ClusterWorkers(address)
