"""What the schemes find in the dense model, and the space of configurations that this opens to the search."""

import warnings

from autocompress.scheme import AUTO, Facts, Scheme, describe
from autocompress.searching.dimensions import on_model
from autocompress.searching.samplers import check_sampler
from autocompress.searching.space import Space
from autocompress.studies.settings import Settings
from autocompress.task import Task, device_of

LOWEST_DENSITY = 0.002  # of the search, where the scheme itself could go lower


def analyze(scheme: Scheme, task: Task) -> tuple[Facts, tuple[str, ...]]:
    """The scheme's facts of the dense model, and what it warned of: layers that it cannot compress."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = scheme.analyze(task.model, task.example_input.to(device_of(task.model)))
    return facts, tuple(str(warning.message) for warning in caught)


class Analyses:
    """What each scheme found out about the task's model, found out once.

    Args:
        task: Whose model it is.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._facts: dict[str, Facts] = {}

    def facts(self, scheme: Scheme) -> Facts:
        """What the scheme found out about the model."""
        spec = describe(scheme)
        if spec not in self._facts:
            self._facts[spec] = analyze(scheme, self._task)[0]
        return self._facts[spec]

    def open_space(self, settings: Settings) -> tuple[Space, tuple[str, ...]]:
        """What the search may choose from on this model, and what the schemes cannot compress in it.

        Raises:
            ValueError: If a scheme that was asked for by name, or each of ``auto``, finds nothing to compress.
        """
        schemes, lows, notes = [], [], dict[str, None]()
        for scheme in settings.schemes:
            try:
                facts, said = analyze(scheme, self._task)
            except ValueError as error:
                if not settings.is_auto:
                    raise
                notes[f"{describe(scheme)} is left out: {error}"] = None
                continue
            schemes.append(scheme)
            self._facts[describe(scheme)] = facts
            lows.append(max(scheme.lowest_density(facts), LOWEST_DENSITY) if scheme.takes_density else 1.0)
            notes |= dict.fromkeys(said)
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
