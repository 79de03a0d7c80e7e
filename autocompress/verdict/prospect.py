"""A study's prospects in words: what its test data can certify, and the nearest trial where none succeeded."""

from collections.abc import Sequence

import numpy as np

from autocompress.certify import certifiable_drop
from autocompress.recovery import settings_of
from autocompress.studies.settings import Settings
from autocompress.task import Evaluation, Task
from autocompress.trial import TrialResult
from autocompress.verdict.change import loss_or_gain
from autocompress.verdict.scores import decisions

SMALL = 0.005  # a drop that counts as one bound where the bound is less
DISAGREEMENT = 0.02  # share of samples on which a model and its compressed form typically disagree


def prospect(settings: Settings, task: Task) -> tuple[str, ...]:
    """A sentence on the drop on test that can be certified, if that is below the bound."""
    n, bound, confidence = task.test.n_samples, settings.bound, settings.confidence
    if task.metric.correct is None or bound.relative:
        return ()
    observed = certifiable_drop(n, bound.max_drop, DISAGREEMENT, confidence)
    where = f"with {n} test samples, and models that disagree on {DISAGREEMENT:.0%} of them"
    if observed is None:
        return (f"{where}, no drop can be certified to be within {100 * bound.max_drop:g} pp",)
    if observed >= round(DISAGREEMENT * n) / n:  # even if all disagreement is loss, it is certified
        return ()
    change, size = loss_or_gain(observed, "drop at most", "gain at least")
    within = f"to be certified within {100 * bound.max_drop:g} pp with {100 * confidence:g}% confidence"
    return (f"{where}, the answer must {change} {100 * size:.2f} pp on test {within}",)


def one_answer(dense: Evaluation, task: Task) -> tuple[str, ...]:
    """A sentence if the dense model predicts the same class for every val sample, although val has others."""
    if dense.targets.ndim == 2 or len(np.unique(dense.targets)) == 1:
        return ()
    predicted = np.unique(decisions(dense.targets, dense.outputs))
    if len(predicted) > 1:
        return ()
    named = task.classes[int(predicted[0])] if task.classes else f"{predicted[0]}"
    return (
        f"the dense model predicts class {named} for each of the {len(dense.targets)} val samples: look whether "
        "it is trained, and on inputs like these",
    )


def nearest_miss(settings: Settings, records: Sequence[TrialResult]) -> str:
    """The trial that came nearest to the bound, and what may help, in words."""
    unit, epochs = settings.unit, settings_of(settings.recovery).get("epochs")
    bound = f"{100 * settings.bound.max_drop:g}{unit}"
    if not records:
        return f"Not met: no trial finished, so nothing but the dense model is known to lose at most {bound}."
    nearest = min(records, key=lambda record: _miss(settings, record))
    required = nearest.constraints
    meeting = f" and meets {' and '.join(one.text for one in required)}" if required else ""
    has = [one.shown for one in required if one.metric != "density"]  # the density is shown anyway
    besides = f" and has {' and '.join(has)}" if has else ""
    changed, size = loss_or_gain(nearest.drop, "loses", "gains")
    larger = "" if required and nearest.drop <= settings.bound.max_drop else "a larger drop, "
    looser = "a looser constraint, " if required else ""
    longer = f"more epochs of recovery than {epochs:g}" if epochs else "a recovery that trains"
    return (
        f"Not met: no trial loses at most {bound}{meeting} on val; the nearest, of density "
        f"{nearest.density:.3g}, {changed} {100 * size:.2f}{unit}{besides}. What may help: {larger}{looser}"
        f"{longer}, another scheme than {settings.scheme}, or more trials than {settings.trials}."
    )


def _miss(settings: Settings, record: TrialResult) -> float:
    """The worst excess of a trial over its requirements: of the drop as a share of the bound, of costs as logs."""
    bound = settings.bound.max_drop
    drop = (record.effective_drop(bound)[0] - bound) / max(bound, SMALL)
    return max([drop, *(one.excess for one in record.constraints if one.is_cost)])
