"""The records of a study's finished trials, and which of them is the answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import optuna
from torch import nn

from autocompress.disk.storage import StudyFolder
from autocompress.formats.bundle import rebuild
from autocompress.scheme import Facts, Scheme, Weights
from autocompress.searching.posterior import Posterior
from autocompress.searching.selection import answer, candidates, finished, posterior, shortlist
from autocompress.searching.space import DENSITY, Configuration, Space
from autocompress.studies.analysis import Analyses
from autocompress.trial import Bound, TrialResult


@dataclass(frozen=True)
class Answer:
    """A trial that may be the study's answer, with all that its model is rebuilt from.

    Attributes:
        trial: The trial's result.
        scheme: Its scheme.
        facts: The scheme's facts of the dense model.
        state: The weights of its realized model.
    """

    trial: TrialResult
    scheme: Scheme
    facts: Facts
    state: Weights

    def rebuilt(self, dense: nn.Module) -> nn.Module:
        """Its model, see `autocompress.formats.bundle.rebuild`."""
        return rebuild(self.scheme, dense, self.facts, self.trial.plan, self.trial.density, self.state)


class Records:
    """The finished trials of a study, in the order in which this process received them.

    Args:
        study: The Optuna study.
        space: The search space.
        bound: The largest allowed drop.
        folder: The study's folder, with the trials' records and weights.
        analyses: The schemes' facts of the dense model.
        warned: Called with a message for each trial whose record or weights are damaged.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        bound: Bound,
        folder: StudyFolder,
        analyses: Analyses,
        warned: Callable[[str], None],
    ) -> None:
        self._study, self._space, self._bound, self._folder = study, space, bound, folder
        self._analyses, self._warned = analyses, warned
        self._known: list[TrialResult] = []
        self._lost: set[int] = set()  # trials whose record or weights are damaged

    def __iter__(self) -> Iterator[TrialResult]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, record: TrialResult) -> None:
        """Adds a trial that has just finished."""
        self._known.append(record)

    def load(self) -> list[TrialResult]:
        """Loads and returns the finished trials that are not here yet, of an earlier run or other processes."""
        known = {record.number for record in self._known} | self._lost
        loaded = []
        for trial in finished(self._study):
            if trial.number in known:
                continue
            try:
                loaded.append(self._folder.load_trial(trial.number))
            except ValueError as error:
                self._lose(trial.number, error)
        self._known += loaded
        return loaded

    def best(self) -> TrialResult | None:
        """The study's answer so far."""
        trial = answer(self._study, self._space, self._bound, self._lost)
        return next((record for record in self._known if trial and record.number == trial.number), None)

    def candidates(self) -> list[int]:
        """Numbers of the possible final answers, see `autocompress.searching.selection.candidates`."""
        return candidates(self._study, self._space, self._bound, self._lost)

    def belief(self, best: TrialResult | None) -> Posterior | None:
        """The posterior of the threshold; with several arms, that of the arm of ``best``."""
        arm = self._space.arm_of(best.params) if best else None
        return posterior(self._study, self._space, self._bound, arm)

    def alike(self, chosen: Configuration) -> set[int]:
        """Numbers of the trials that differ from a configuration in density only: it can start from them."""
        return {
            record.number for record in self._known if record.params == chosen.params and self._space.is_finite
        }

    def shortlist(self) -> list[Answer]:
        """The trials to judge on test, densest first, the search's answer last; all with undamaged weights."""
        while (best := answer(self._study, self._space, self._bound, self._lost)) is not None:
            listed = [self.whole(trial.number) for trial in shortlist(self._study, self._space, best, self._lost)]
            whole = [candidate for candidate in listed if candidate is not None]
            if len(whole) == len(listed):  # otherwise a trial was lost just now, and the answer may be another
                return whole
        return []

    def whole(self, number: int) -> Answer | None:
        """A trial with its weights; if they are damaged None, and the trial cannot be the answer any more."""
        try:
            state = self._folder.load_weights(number)
        except (OSError, ValueError) as error:
            self._lose(number, error)
            return None
        trial = next(record for record in self._known if record.number == number)
        scheme = self._space.configuration({DENSITY: trial.density_asked, **trial.params}).scheme
        return Answer(trial, scheme, self._analyses.facts(scheme), state)

    def _lose(self, number: int, error: Exception) -> None:
        """Excludes a damaged trial from the answers, with a warning."""
        self._lost.add(number)
        self._warned(f"trial {number} cannot be the answer: {error}")
