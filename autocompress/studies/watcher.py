"""What a study reports as it goes, and to whom."""

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
    """What is known before the first trial, for whoever watches.

    Attributes:
        name: The study's name.
        task: What is compressed.
        settings: What is asked.
        folder: Where the study lives.
        dense: What the dense model costs; no time is taken unless the objective needs it.
        dense_score: Its score on val.
        low: The lowest density that the search may propose.
        notes: What the scheme had to leave out, and what the test data can certify.
        workers: How many trials run at a time.
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
    """Is told how a study goes, to show it."""

    def doing(self, what: str) -> None:
        """What takes time now, in words."""

    def began(self, beginning: Beginning) -> None:
        """The dense model is known; trials begin."""

    def trial(self, result: TrialResult, best: TrialResult | None, belief: Posterior | None) -> None:
        """A trial has finished; ``best`` is what the answer would be now."""

    def failed(self, number: int, reason: str) -> None:
        """A trial ended without a result."""

    def warned(self, message: str) -> None:
        """Something was left out or went wrong without ending the study."""


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
