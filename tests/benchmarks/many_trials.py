"""Time that a study with many recorded trials takes to open, propose, resume and report.

    python tests/benchmarks/many_trials.py [TRIALS]

The trials are synthetic. Prints the processor seconds of each step, and exits with 1 if resuming takes more than
5, the report more than 20, or the proposal of a density more than 0.05, for the first one after a new result as
for further ones. Each is the shortest of five runs, to exclude other load on the machine.
"""

import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna

from autocompress.disk.mend import restore, set_aside_if_damaged
from autocompress.disk.optuna_store import open_study
from autocompress.disk.storage import StudyFolder
from autocompress.lc import LearningCompression
from autocompress.report import write_report
from autocompress.schemes import StructPrune
from autocompress.search import Plan, add_dense, adopt, entry_of, set_sampler
from autocompress.searching.selection import answer, finished, posterior
from autocompress.searching.space import Configuration, Space
from autocompress.trial import Bound, TrialResult

SPACE = Space((StructPrune(),), LearningCompression(), (0.002,))
MOST_S = {
    "resuming": 5,
    "the report": 20,
    "a density, with no new result": 0.05,
    "a density after a new result": 0.05,
}
REPEATS = 5
took: dict[str, list[float]] = {}


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.process_time()
    yield
    took.setdefault(what, []).append(time.process_time() - began)
    print(f"{what:45s}{took[what][-1]:8.3f} s", flush=True)


def main() -> int:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    recorded = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "recorded.py")))
    rng, bound = np.random.default_rng(0), Bound(0.01)
    trials = []
    for number in range(1, n + 1):
        density = float(np.exp(rng.uniform(np.log(0.01), 0)))
        trials.append(
            recorded.trial(number, density, float(0.002 * rng.standard_normal() + 0.0015 / density**0.5))
        )
    with tempfile.TemporaryDirectory() as home:
        path = recorded.write_study(Path(home), trials=trials, result=recorded.found(trials))
        folder, plan = StudyFolder(path), Plan(SPACE, bound, n + 10)
        study = open_study(folder.journal_file, "minimize")
        add_dense(study, SPACE, [1.0], bound)
        with timed("making a journal of the records"):
            restore(study, SPACE, bound, folder)
        with timed("resuming"):
            assert set_aside_if_damaged(folder) is None
            study = open_study(folder.journal_file, "minimize")
            set_sampler(study, "threshold", plan, 0)
            adopt(study, bound, folder)
            restore(study, SPACE, bound, folder)
            assert len([folder.load_trial(trial.number) for trial in finished(study)]) == n
            answer(study, SPACE, bound)
            posterior(study, SPACE, bound)
        known = folder.load_trial(n)
        for _ in range(REPEATS):
            with timed("a density, with no new result"):
                trial, chosen = ask(study, plan)
            tell(study, trial, replace(known, number=trial.number, density_asked=chosen.density), bound)
            with timed("a density after a new result"):
                ask(study, plan)
        folder.close()
        with timed("the report"):
            write_report(path)
        print(f"the journal has {(path / 'journal.log').stat().st_size / 1e6:.1f} MB")
    return 1 if any(min(took[what]) > most for what, most in MOST_S.items()) else 0


def ask(study: optuna.Study, plan: Plan) -> tuple[optuna.Trial, Configuration]:
    """The search's work before each trial: it decides whether to stop and proposes a density."""
    study.sampler.done(study.get_trials(deepcopy=False), plan.tolerance)
    trial = study.ask()
    return trial, SPACE.suggest(trial)


def tell(study: optuna.Study, trial: optuna.Trial, result: TrialResult, bound: Bound) -> None:
    """Enters a result into the study."""
    attributes, constraints = entry_of(result, bound)
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for name, excess in constraints.items():
        trial.set_constraint(name, excess)
    study.tell(trial, result.values)


if __name__ == "__main__":
    sys.exit(main())
