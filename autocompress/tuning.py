"""`autocompress.tune`: checks the arguments, opens the study's folder and runs the study."""

import contextlib
import errno
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from autocompress.arguments import flag, instance, listing, number, path, several, takes, text, whole
from autocompress.certify import CONFIDENCE
from autocompress.data import checked_task
from autocompress.disk.environment import provenance
from autocompress.disk.files import DEFAULT_OUT, called, read_json
from autocompress.disk.storage import (
    StudyFolder,
    check_free,
    new_folder,
    prepare_out,
    resume_folder,
    study_settings,
)
from autocompress.experiments.mlflow_store import without_secrets
from autocompress.export import check_formats
from autocompress.gauges.devices import usable_device
from autocompress.gauges.runtimes import check_runtime
from autocompress.goal import Objective, as_objective
from autocompress.learning.ranks import team
from autocompress.measurement import Measurement
from autocompress.plugins import write_files_as
from autocompress.processes.aside import Aside
from autocompress.recovery import Recovery, as_recovery
from autocompress.scheme import Scheme, as_schemes, is_auto
from autocompress.search import TOLERANCE
from autocompress.searching.dimensions import Search, parse_dimensions
from autocompress.searching.samplers import check_sampler
from autocompress.searching.space import Space
from autocompress.studies.result import Result
from autocompress.studies.settings import DEFAULT_TRIALS, Settings
from autocompress.studies.watcher import Silent, Watcher
from autocompress.study import Study
from autocompress.task import Task
from autocompress.tracking import MEANWHILE, Tracker
from autocompress.trial import Bound
from autocompress.verdict.limit import REQUIREMENT, Requirement, parse_constraints

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

Asked: TypeAlias = str | Objective | Callable[[Measurement], float]


@takes(
    max_drop=number.such_as("0.01 for one point"),
    constraints=several(REQUIREMENT),
    trials=whole,
    timeout=number.such_as("60 for a minute"),
    epochs_total=number,
    tolerance=number.such_as("0.15 for 15%"),
    confidence=number.such_as("0.95"),
    epochs=number,
    cheap_trials=flag,
    search=instance("a text or a mapping", str, Mapping),
    sampler=text,
    seed=whole,
    workers=whole,
    cluster=text,
    storage=text,
    runtime=text,
    out=path,
    name=text,
    resume=text,
    watcher=instance("a Watcher", Watcher),
    tracking_uri=text,
    register=text,
    formats=several(text),
    command=text,
)
def tune(
    task: Task | Callable[[], Task] | None = None,
    scheme: str | Scheme | Sequence[str | Scheme] = "StructPrune",
    max_drop: float = 0.01,
    *,
    constraints: str | Requirement | Sequence[str | Requirement] = (),
    drop: Literal["absolute", "relative"] = "absolute",
    objective: Asked | Sequence[Asked] | None = None,
    trials: int = DEFAULT_TRIALS,
    timeout: float | None = None,
    epochs_total: float | None = None,
    tolerance: float = TOLERANCE,
    confidence: float = CONFIDENCE,
    epochs: float | None = None,
    recovery: str | Recovery = "auto",
    cheap_trials: bool = False,
    search: Search = "",
    sampler: str | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    workers: int = 1,
    cluster: str | None = None,
    storage: str | None = None,
    runtime: str = "eager",
    profile_device: str | torch.device | None = None,
    out: str | Path = DEFAULT_OUT,
    name: str | None = None,
    resume: str | None = None,
    watcher: Watcher | None = None,
    tracking_uri: str | None = None,
    register: str | None = None,
    formats: str | Sequence[str] = (),
    command: str | None = None,
) -> Result:
    """Finds the best compressed model whose metric drops by at most ``max_drop``, judges it on test, and saves it.

    Args:
        task: The task, or a function that makes it, which is called after all other arguments have been checked;
            by default the digits, see `autocompress.digits`.
        scheme: The scheme: a name, a sum of names, or a `Scheme`. The search chooses one of several; ``"auto"``
            stands for those that suit the model.
        max_drop: The largest allowed drop of the task's metric, as a fraction: 0.01 is one point.
        constraints: Further conditions on scores, such as ``"sensitivity>=0.95"``, and limits on costs, by any
            objective: ``"latency<=5ms"``, ``"size<=1MB"``.
        drop: Whether ``max_drop`` is in points of the metric, or relative to the dense model's score.
        objective: The number to optimize: a name, ``file.py:name``, an `Objective` or a function of a
            `Measurement`. With a list of several, the search seeks their Pareto front, and the answer is the trial
            on it with the smallest product. By default the density; with several schemes the size, by which they
            can be compared.
        trials: The largest number of trials.
        timeout: Seconds after which no further trial begins.
        epochs_total: Passes over the training data, by all trials together, after which no further trial begins.
        tolerance: The search ends when the 80% interval of the lowest feasible density is relatively this narrow:
            0.15 is 15%; in the last quarter of its trials also when an answer is as near to that density.
        confidence: Confidence of the verdict on test, between 0.5 and 1.
        epochs: Budget of one trial's recovery, in passes over the training data.
        recovery: The recovery of each trial: a name of `autocompress.recovery.RECOVERIES`, or a
            `LearningCompression` with your own settings, whose budget ``epochs`` replaces if given. ``"auto"`` is
            gradual pruning for schemes that remove channels or with very few steps, else learning-compression.
        cheap_trials: Whether a trial starts from the nearest denser model, with fewer steps, and gives up if it
            can hardly meet the bound. By default each starts from the dense model and uses its whole budget.
        search: Parameters to vary beside the density: ``{"criterion": ["l1", "l2"], "lr": (0.01, 0.3),
            "stage-density": None}``, with a list of values, a range, or None for the usual values; or as text,
            ``"criterion=l1,l2; lr=0.01..0.3; stage-density"``.
        sampler: The sampler of configurations: threshold, gp, tpe, bisection, grid or random; by default
            threshold, or gp if ``search`` has a range.
        seed: Seeds the search and the trials.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
        workers: Number of trials at a time, each in a process with its own GPU or a share of the CPU's threads; 1
            runs them in this process.
        cluster: The address of a Dask scheduler whose workers run the trials, such as ``"tcp://scheduler:8786"``.
        storage: The address of a database for the Optuna study, such as ``"postgresql://user@host/name"``, instead
            of a journal in the study's folder: processes on several machines, which share ``out``, can then run
            one study together. The first one starts it, the others resume it.
        runtime: The runtime in which objectives measure latency: ``"eager"``, ``"compile"`` or ``"onnxruntime"``.
        profile_device: The device on which latency, memory and energy are measured; by default ``device``.
        out: The folder of all studies; nothing is written outside it.
        name: The study's name; by default made of the task, the scheme and the time.
        resume: The name of a study to resume; ``name`` is ignored then.
        watcher: Receives the study's progress; by default nothing is shown.
        tracking_uri: An MLflow server to log to instead of the database in ``out``; by default, a study that is
            resumed keeps its own.
        register: The name under which MLflow registers the answer as a model.
        formats: Formats to export in addition to the usual ones: ``("executorch",)``.
        command: The command line, for the report.

    Raises:
        ValueError: If an argument is not usable; the message says what is allowed.
        OSError: If the disk is full or fails; what has finished is kept.
    """
    if resume:
        write_files_as(study_settings(Path(out).resolve(), resume).get("files", {}))
    recovery = as_recovery(recovery, epochs)
    schemes = as_schemes(scheme)
    dimensions = parse_dimensions(search, schemes, recovery)
    objectives = _objectives(objective, "density" if len(schemes) == 1 else "size")
    settings = Settings(
        schemes=schemes,
        dimensions=dimensions,
        bound=Bound(max_drop, relative=_is_relative(drop)),
        objectives=objectives,
        is_auto=is_auto(scheme),
        # Refuses an unknown name before the dense model is trained; the densities here are placeholders, as the
        # lowest ones depend on the model.
        sampler=check_sampler(
            sampler, Space(schemes, recovery, (0.5,) * len(schemes), dimensions), len(objectives)
        ),
        recovery=recovery,
        seed=seed,
        trials=trials,
        timeout_s=timeout,
        epochs_total=epochs_total,
        device=usable_device(device),
        runtime=check_runtime(runtime, usable_device(profile_device or device)),
        profile_device=usable_device(profile_device) if profile_device else None,
        tolerance=tolerance,
        confidence=confidence,
        workers=workers,
        formats=check_formats(formats),
        cheap_trials=cheap_trials,
        cluster=cluster,
    )
    if team().size > 1 and (workers > 1 or cluster):
        raise ValueError("workers= and cluster= run several trials at a time, torchrun one: give up either")
    watcher = watcher or Silent()
    place = _Place(prepare_out(Path(out)), name, resume, storage)
    if name is not None and not resume:
        check_free(place.home, name)
    task = checked_task(task, place.home, watcher.doing)
    settings = replace(settings, constraints=parse_constraints(constraints, task.classes))
    return _run(settings, task, place, watcher, tracking_uri=tracking_uri, register=register, command=command)


@dataclass(frozen=True)
class _Place:
    """The place where a new study is stored, or a study that is resumed."""

    home: Path  # the folder of all studies
    name: str | None
    resume: str | None
    storage: str | None

    def database(self) -> contextlib.AbstractContextManager["RDBStorage | None"]:
        """A context with the database of the Optuna study, or with None if the study has a journal.

        Raises:
            ValueError: If a database is given for a study that is resumed and has a journal.
        """
        stored = study_settings(self.home, self.resume).get("storage") if self.resume else self.storage
        if self.storage and not stored:
            raise ValueError(f"the study {self.resume!r} is kept in its folder and stays there; leave storage out")
        address: str | None = self.storage or stored  # the stored one has no password
        if address is None:
            return contextlib.nullcontext()
        from autocompress.disk.database import connected  # imports SQLAlchemy, which takes a quarter of a second

        return connected(address)

    @contextlib.contextmanager
    def opened(
        self, settings: Settings, task: Task, watcher: Watcher, command: str | None
    ) -> Iterator[StudyFolder]:
        """A context with the study's folder, which is removed again if the study ends before its search begins."""
        folder = self._folder(settings, task, command)
        try:
            yield folder
        except KeyboardInterrupt:
            if self.resume or folder.has_begun:
                resume = f"autocompress tune --resume {called(folder.path)} goes on"
                watcher.warned(f"stopped at once; every finished trial is kept, and {resume}")
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise
            raise OSError(
                f"cannot write to {folder.path} any more ({error.strerror}); every finished trial is kept, and "
                "the study can be resumed"
            ) from error
        finally:
            if self.resume or folder.has_begun:
                folder.close()
            else:  # so that its name can be used again
                folder.discard()

    def _folder(self, settings: Settings, task: Task, command: str | None) -> StudyFolder:
        identity = settings.identity(task)
        changeable = {**settings.budget(), "task_options": task.options, "files": settings.files(task)}
        if self.resume:
            folder = resume_folder(self.home, self.resume, identity)
            folder.update_settings(changeable)
            return folder
        fixed = {**identity, "provenance": provenance(task, command)}
        if self.storage:
            fixed |= {"storage": without_secrets(self.storage), "study_id": uuid.uuid4().hex}
        return new_folder(self.home, self.name, fixed | changeable)


def _run(
    settings: Settings,
    task: Task,
    place: _Place,
    watcher: Watcher,
    *,
    tracking_uri: str | None,
    register: str | None,
    command: str | None,
) -> Result:
    """Runs a new study, or one that is resumed."""
    with place.database() as database, place.opened(settings, task, watcher, command) as folder:
        uri = tracking_uri or read_json(folder.settings_file).get("tracking_uri")
        folder.update_settings({"tracking_uri": uri and without_secrets(uri)})

        def make_tracker(aside: Aside) -> Tracker:
            return Tracker(
                place.home,
                task.name,
                uri=uri,
                device=settings.device,
                aside=aside,
                meanwhile=f"{MEANWHILE}; autocompress replay {called(folder.path)} logs it later",
                on_warning=watcher.warned,
            )

        on_device = task.on(settings.device)
        return Study(settings, on_device, folder, watcher, make_tracker, register, database).run()


def _objectives(given: Asked | Sequence[Asked] | None, default: str) -> tuple[Objective, ...]:
    return tuple(as_objective(objective) for objective in listing(given) or (default,))


def _is_relative(drop: str) -> bool:
    if drop not in ("absolute", "relative"):
        raise ValueError(f"drop={drop!r}; it must be 'absolute' or 'relative'")
    return drop == "relative"
