"""Runs the schemes' analyses of the dense model, which determine the search space."""

import warnings

from autocompress.scheme import AUTO, Facts, Scheme, describe
from autocompress.searching.dimensions import on_model
from autocompress.searching.samplers import check_sampler
from autocompress.searching.space import Space
from autocompress.studies.settings import Settings
from autocompress.task import Task, device_of

LOWEST_DENSITY = 0.002  # of a search, even if the scheme can go lower


def analyze(scheme: Scheme, task: Task) -> tuple[Facts, tuple[str, ...]]:
    """Analyzes the dense model with a scheme; returns the facts and the warnings, as of layers it leaves out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = scheme.analyze(task.model, task.example_input.to(device_of(task.model)))
    return facts, tuple(str(warning.message) for warning in caught)


class Analyses:
    """The schemes' facts of the task's dense model, each computed once.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._facts: dict[str, Facts] = {}

    def facts(self, scheme: Scheme) -> Facts:
        """The scheme's facts of the model."""
        spec = describe(scheme)
        if spec not in self._facts:
            self._facts[spec] = analyze(scheme, self._task)[0]
        return self._facts[spec]

    def open_space(self, settings: Settings) -> tuple[Space, tuple[str, ...]]:
        """Analyzes the model with all schemes.

        Returns:
            The search space, and notes on schemes and layers that are left out.

        Raises:
            ValueError: If a scheme given by name, or each of ``auto``, finds nothing to compress.
        """
        schemes, lows, notes = [], [], dict[str, None]()  # a dict as an ordered set
        for scheme in settings.schemes:
            try:
                facts, warned = analyze(scheme, self._task)
            except ValueError as error:
                if not settings.is_auto:
                    raise
                notes[f"{describe(scheme)} is left out: {error}"] = None
                continue
            schemes.append(scheme)
            self._facts[describe(scheme)] = facts
            lows.append(max(scheme.lowest_density(facts), LOWEST_DENSITY) if scheme.takes_density else 1.0)
            notes |= dict.fromkeys(warned)
        dimensions = on_model(settings.dimensions, self._task.model)
        if not schemes:
            raise ValueError(f"no scheme of {AUTO} finds anything in this model that it can compress")
        space = Space(tuple(schemes), settings.recovery, tuple(lows), dimensions)
        check_sampler(settings.sampler, space, len(settings.objectives))
        if len(space.arms) > 1 and settings.trials < 2 * len(space.arms):
            notes[
                f"{len(space.arms)} combinations are tried; {settings.trials} trials are few, "
                f"{2 * len(space.arms)} or more can tell them apart"
            ] = None
        return space, tuple(notes)
