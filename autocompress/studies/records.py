"""What a study knows of its finished trials: what each came to, which cannot answer, and which one does."""

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
    """A trial that a study may answer with, and what its model is made of.

    Attributes:
        trial: The trial.
        scheme: How it was compressed.
        facts: What the scheme found out about the dense model.
        state: Its weights.
    """

    trial: TrialResult
    scheme: Scheme
    facts: Facts
    state: Weights

    def rebuilt(self, dense: nn.Module) -> nn.Module:
        """Its model, see `autocompress.formats.bundle.rebuild`."""
        return rebuild(self.scheme, dense, self.facts, self.trial.plan, self.trial.density, self.state)


class Records:
    """The finished trials of a study, in the order in which they became known here.

    Args:
        study: Knows which trials have finished.
        space: What each could choose from.
        bound: What may be lost.
        folder: Has their records and weights.
        analyses: What the schemes found out about the dense model.
        warned: Is told of a trial whose record or weights are damaged.
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
        """Enters a trial that has just finished."""
        self._known.append(record)

    def load(self) -> list[TrialResult]:
        """Enters what has finished without being added: in an earlier run, or run by others; these records."""
        known = {record.number for record in self._known} | self._lost
        found = []
        for trial in finished(self._study):
            if trial.number in known:
                continue
            try:
                found.append(self._folder.load_trial(trial.number))
            except ValueError as error:
                self._lose(trial.number, error)
        self._known += found
        return found

    def best(self) -> TrialResult | None:
        """What the answer would be now."""
        chosen = answer(self._study, self._space, self._bound, self._lost)
        return next((one for one in self._known if chosen and one.number == chosen.number), None)

    def candidates(self) -> list[int]:
        """Trials that may be the answer in the end, see `autocompress.searching.selection.candidates`."""
        return candidates(self._study, self._space, self._bound, self._lost)

    def belief(self, best: TrialResult | None) -> Posterior | None:
        """What is known of the threshold, of several arms that of this answer's."""
        arm = self._space.arm_of(best.params) if best else None
        return posterior(self._study, self._space, self._bound, arm)

    def alike(self, chosen: Configuration) -> set[int]:
        """The trials that differ from a configuration in density alone: it can start from what they left."""
        return {one.number for one in self._known if one.params == chosen.params and self._space.is_finite}

    def shortlist(self) -> list[Answer]:
        """What is judged on test, densest first, the search's answer last: only trials whose weights are whole."""
        while (chosen := answer(self._study, self._space, self._bound, self._lost)) is not None:
            listed = [self.whole(one.number) for one in shortlist(self._study, self._space, chosen, self._lost)]
            whole = [one for one in listed if one is not None]
            if len(whole) == len(listed):
                return whole
        return []

    def whole(self, number: int) -> Answer | None:
        """A trial with its weights; None, and it cannot answer any more, where they are damaged."""
        try:
            state = self._folder.load_weights(number)
        except (OSError, ValueError) as error:
            self._lose(number, error)
            return None
        trial = next(record for record in self._known if record.number == number)
        scheme = self._space.configuration({DENSITY: trial.density_asked, **trial.params}).scheme
        return Answer(trial, scheme, self._analyses.facts(scheme), state)

    def _lose(self, number: int, error: Exception) -> None:
        self._lost.add(number)
        self._warned(f"trial {number} cannot be the answer: {error}")
