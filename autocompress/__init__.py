"""Finds the smallest version of a trained PyTorch network within an accuracy bound, certified on held-out data.

>>> import autocompress as ac
>>> result = ac.tune(ac.digits(), scheme="StructPrune", max_drop=0.01)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.data import digits
    from autocompress.gauges.latency import Latency
    from autocompress.goal import Objective, objective
    from autocompress.lc import LearningCompression
    from autocompress.measurement import Measurement, compare, measure
    from autocompress.metrics import Metric, accuracy, balanced_accuracy
    from autocompress.networks.cka import layer_similarity, linear_cka
    from autocompress.own_task import make_task
    from autocompress.scheme import Compose, Scheme, Theta, parse_scheme, register_scheme
    from autocompress.splits import TensorSplit
    from autocompress.studies.answer import load
    from autocompress.studies.result import Result
    from autocompress.studies.watcher import Watcher
    from autocompress.sweeping import sweep
    from autocompress.sweeps.sweep_result import Sweep
    from autocompress.task import Task
    from autocompress.tuning import tune

# The public names by module. They are imported on first use, as importing torch, MLflow and Optuna takes seconds.
_HOMES = {
    "studies.answer": ("load",),
    "networks.cka": ("layer_similarity", "linear_cka"),
    "data": ("digits",),
    "lc": ("LearningCompression",),
    "own_task": ("make_task",),
    "gauges.latency": ("Latency",),
    "measurement": ("Measurement", "compare", "measure"),
    "metrics": ("Metric", "accuracy", "balanced_accuracy"),
    "goal": ("Objective", "objective"),
    "studies.result": ("Result",),
    "scheme": ("Compose", "Scheme", "Theta", "parse_scheme", "register_scheme"),
    "tuning": ("tune",),
    "sweeps.sweep_result": ("Sweep",),
    "sweeping": ("sweep",),
    "splits": ("TensorSplit",),
    "task": ("Task",),
    "studies.watcher": ("Watcher",),
}

__all__ = [
    "Compose",
    "Latency",
    "LearningCompression",
    "Measurement",
    "Metric",
    "Objective",
    "Result",
    "Scheme",
    "Sweep",
    "Task",
    "TensorSplit",
    "Theta",
    "Watcher",
    "accuracy",
    "balanced_accuracy",
    "compare",
    "digits",
    "layer_similarity",
    "linear_cka",
    "load",
    "make_task",
    "measure",
    "objective",
    "parse_scheme",
    "register_scheme",
    "sweep",
    "tune",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"autocompress.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'autocompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
