"""Repairs a damaged Optuna journal from the sealed records of the trials."""

import json
from pathlib import Path

import optuna
from optuna.trial import TrialState

from autocompress.disk.optuna_store import open_study
from autocompress.disk.storage import StudyFolder
from autocompress.search import entry_of
from autocompress.searching.selection import finished
from autocompress.searching.space import DENSITY, Space
from autocompress.trial import Bound

LOST = "its entry in the journal was damaged"


def set_aside_if_damaged(folder: StudyFolder) -> str | None:
    """Renames the journal if it is damaged.

    It is damaged if a line is not an entry of Optuna's, if Optuna cannot replay it, or if a trial's results differ
    from its record. An incomplete last line, as a killed process leaves it, is no damage.

    Returns:
        The damage in one sentence; None if there is none.
    """
    problem = _damage(folder)
    if problem is None:
        return None
    aside = folder.journal_file.with_name("journal.log.damaged")
    folder.journal_file.replace(aside)
    return f"{problem}; it is kept as {aside.name} and made again from the records of the trials"


def _damage(folder: StudyFolder) -> str | None:
    journal = folder.journal_file
    if not journal.is_file():
        return None
    lines = journal.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not _is_entry(line):
            return f"line {number} of {journal} is damaged"
    if not lines:
        return None
    try:
        study = open_study(journal)
    except Exception as error:  # Optuna asserts, and looks up names without checks
        return f"{journal} is damaged: {type(error).__name__}: {error}"
    if study.trials and not study.trials[0].user_attrs.get("dense"):
        return f"{journal} is damaged: it does not begin with the dense model"
    for trial in finished(study):
        try:
            record = folder.load_trial(trial.number)
        except ValueError:  # the record itself is damaged, which is reported when it is needed
            continue
        entry = (tuple(trial.values), *(trial.user_attrs.get(name) for name in ("density", "score", "feasible")))
        if entry != (record.values, record.density, record.score, record.feasible):
            return f"{journal} is damaged: trial {trial.number} is another in its record"
    return None


def _is_entry(line: bytes) -> bool:
    """Whether a line of the journal is JSON in the form of Optuna's entries."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("op_code"), int)


def restore(study: optuna.Study, space: Space, bound: Bound, folder: StudyFolder) -> None:
    """Adds the trials that have a record but are missing in the study.

    Numbers without a usable record between them are added as failed trials, as Optuna numbers without gaps.
    """
    for path in sorted(folder.path.glob("trials/*/trial.json")):
        number = _number(path)
        n_trials = len(study.get_trials(deepcopy=False))
        if number is None or number < n_trials:
            continue
        try:
            result = folder.load_trial(number)
        except ValueError:  # a damaged record: its number is added as failed before the next trial
            continue
        for _ in range(n_trials, number):
            study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"reason": LOST}))
        attributes, constraints = entry_of(result, bound)
        study.add_trial(
            optuna.trial.create_trial(
                values=result.values,
                params={DENSITY: result.density_asked, **result.params},
                distributions=space.distributions,
                user_attrs=attributes,
                constraints=constraints,
            )
        )


def _number(record: Path) -> int | None:
    return int(record.parent.name) if record.parent.name.isdecimal() else None
