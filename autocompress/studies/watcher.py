"""Watchers, which receive and show the progress of a study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from autocompress.measurement import Measurement
from autocompress.searching.posterior import Posterior
from autocompress.studies.settings import Settings
from autocompress.task import Task
from autocompress.trial import TrialResult


@dataclass(frozen=True)
class Beginning:
    """What is known of a study before its first trial.

    Attributes:
        name: The study's name.
        task: The task.
        settings: The study's settings.
        folder: The study's folder.
        dense: The dense model's measurement; it is timed only if an objective or a limit needs it.
        dense_score: The dense model's score on val.
        low: The lowest density that the search may propose.
        notes: Remarks for the user, such as layers that cannot be compressed, or what the test data can certify.
        workers: Number of trials that run at a time.
    """

    name: str
    task: Task
    settings: Settings
    folder: Path
    dense: Measurement
    dense_score: float
    low: float
    notes: tuple[str, ...]
    workers: int = 1


@runtime_checkable
class Watcher(Protocol):
    """Receives the progress of a study, to show it."""

    def doing(self, what: str) -> None:
        """Called before each step that takes time, with its description."""

    def began(self, beginning: Beginning) -> None:
        """Called when the dense model has been measured, before the first trial."""

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """Called after a trial has finished; ``best`` is the study's answer so far, ``belief`` its posterior."""

    def failed(self, number: int, reason: str) -> None:
        """Called after a trial has ended without a result."""

    def warned(self, message: str) -> None:
        """Called when something was left out or went wrong without ending the study."""


class Silent:
    """A watcher that shows nothing."""

    def doing(self, what: str) -> None:
        """Nothing."""

    def began(self, beginning: Beginning) -> None:
        """Nothing."""

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """Nothing."""

    def failed(self, number: int, reason: str) -> None:
        """Nothing."""

    def warned(self, message: str) -> None:
        """Nothing."""
