"""Recovery: how a network is compressed and regains its accuracy. L-C, and the baselines it is compared with.

All of them train through the same L step with the same data, teacher and learning-rate schedule. Most are special
cases of L-C: at μ = ∞ weights that a C step prunes are zero at once and for good.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

from torch import nn

from autocompress import progress
from autocompress.arguments import check_fields, whole
from autocompress.lc import PEAK_LR, SOFT, LearningCompression
from autocompress.learning.learner import Learner
from autocompress.learning.polish import frozen, settle
from autocompress.learning.state import Recovered
from autocompress.learning.training import Optimizer
from autocompress.scheme import Facts, Scheme, observe
from autocompress.splits import Split
from autocompress.task import Task


@runtime_checkable
class Recovery(Protocol):
    """A way to compress a model and train it, as a frozen dataclass."""

    @property
    def method(self) -> str:
        """Its name, see `RECOVERIES`."""

    def n_steps(self, train: Split) -> int:
        """Gradient steps of the whole budget."""

    def recover(
        self, model: nn.Module, scheme: Scheme, facts: Facts, density: float, task: Task, seed: int
    ) -> Recovered:
        """Compresses ``model`` in place, see `LearningCompression.recover`."""


def learning_compression(mu: float = SOFT, **settings: Any) -> LearningCompression:
    """L-C with a finite penalty, whatever the scheme: weights to be pruned are drawn to zero and may come back."""
    return LearningCompression(mu=mu, **settings)


def gradual(**settings: Any) -> LearningCompression:
    """Gradual pruning: the density falls step by step, and pruned weights are zero at once.

    Zhu & Gupta, "To Prune, or Not to Prune" (2017).
    """
    return LearningCompression(mu=math.inf, **settings)


def rewind(**settings: Any) -> LearningCompression:
    """One-shot pruning, then training with the learning rate rewound to its peak.

    Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning" (ICLR 2020).
    """
    return LearningCompression(mu=math.inf, alternating=0.0, **settings)


def finetune(lr: float | None = None, optimizer: Optimizer = "sgd", **settings: Any) -> LearningCompression:
    """One-shot pruning, then fine-tuning at a small learning rate: by default a tenth of the others' peak.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (NeurIPS 2015).
    """
    return rewind(lr=PEAK_LR[optimizer] / 10 if lr is None else lr, optimizer=optimizer, **settings)


@dataclass(frozen=True)
class Iterative:
    """Rounds of pruning and training in turn, each with its own learning-rate schedule.

    The density falls by the same factor in every round (Han et al., NeurIPS 2015; Renda et al., ICLR 2020).

    Args:
        training: The settings of the training; its budget is that of all the rounds together.
        rounds: Number of rounds.
    """

    training: LearningCompression = field(default_factory=rewind)
    rounds: int = 4

    @property
    def method(self) -> str:
        """Its name."""
        return "iterative"

    def __post_init__(self) -> None:
        check_fields(self, rounds=whole)
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}; it must be at least 1")

    def n_steps(self, train: Split) -> int:
        """Gradient steps of all the rounds together."""
        return self.training.n_steps(train)

    def recover(
        self, model: nn.Module, scheme: Scheme, facts: Facts, density: float, task: Task, seed: int
    ) -> Recovered:
        """Compresses ``model`` in place, see `Recovery.recover`."""
        total = self.n_steps(task.train)
        rounds = min(self.rounds, total)
        for i in range(rounds):
            steps = total * (i + 1) // rounds - total * i // rounds
            target = density ** ((i + 1) / rounds)
            training = replace(self.training, steps=steps)
            with progress.span(i / rounds, (i + 1) / rounds):
                recovered = training.recover(model, scheme, facts, target, task, seed * rounds + i)
        return replace(recovered, steps=total)


@dataclass(frozen=True)
class Layerwise:
    """Prunes one layer after the other to its final density, with training after each.

    The scheme decides on the dense model, once, which entries of each layer it prunes at the target density.

    Args:
        training: The settings of the training; its budget is that of all the layers together.
    """

    training: LearningCompression = field(default_factory=rewind)

    @property
    def method(self) -> str:
        """Its name."""
        return "layerwise"

    def n_steps(self, train: Split) -> int:
        """Gradient steps of all the layers together."""
        return self.training.n_steps(train)

    def recover(
        self, model: nn.Module, scheme: Scheme, facts: Facts, density: float, task: Task, seed: int
    ) -> Recovered:
        """Compresses ``model`` in place, see `Recovery.recover`."""
        learner = Learner(self.training.suiting(scheme, task.train), model, task, seed)
        facts = observe(scheme, learner.evidence(), facts)
        theta = scheme.pi({name: w.detach() for name, w in learner.weights.items()}, density, facts)
        all_layers = frozen(scheme, theta)
        bound = all_layers.bound.keys()
        pruned: list[str] = []
        layers = _by_layer([name for name in learner.weights if name in bound])
        for n_left, names in zip(range(len(layers), 0, -1), layers, strict=True):
            pruned += names
            penalty = all_layers.only(pruned)
            penalty.apply(learner.weights, lr=1.0)
            learner.l_step(learner.descent.steps_left // n_left, penalty)
        return Recovered(settle(scheme, learner, density, facts, task), steps=learner.descent.taken)


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Groups the names of parameters by layer, in their order."""
    return [list(layer) for _, layer in groupby(names, key=lambda name: name.rpartition(".")[0])]


@dataclass(frozen=True)
class Untrained:
    """Compression without training: only BatchNorm's statistics are recalibrated."""

    @property
    def method(self) -> str:
        """Its name."""
        return "none"

    def n_steps(self, train: Split) -> int:
        """Zero gradient steps."""
        return 0

    def recover(
        self, model: nn.Module, scheme: Scheme, facts: Facts, density: float, task: Task, seed: int
    ) -> Recovered:
        """Compresses ``model`` in place, see `Recovery.recover`."""
        learner = Learner(LearningCompression(distill=0.0), model, task, seed)
        facts = observe(scheme, learner.evidence(), facts)
        return Recovered(settle(scheme, learner, density, facts, task))


def iterative(rounds: int = Iterative.rounds, **settings: Any) -> Iterative:
    """Rounds of one-shot pruning and training, see `Iterative`."""
    return Iterative(rewind(**settings), rounds)


def layerwise(**settings: Any) -> Layerwise:
    """One layer after the other, see `Layerwise`."""
    return Layerwise(rewind(**settings))


def untrained(**settings: Any) -> Untrained:
    """No training at all, see `Untrained`; it takes no settings.

    Raises:
        ValueError: If a setting is given.
    """
    for name, value in settings.items():
        raise ValueError(f"{name}={value} is of training, and recovery 'none' trains nothing; leave it out")
    return Untrained()


RECOVERIES: Mapping[str, Callable[..., Recovery]] = {
    "auto": LearningCompression,
    "lc": learning_compression,
    "gradual": gradual,
    "iterative": iterative,
    "layerwise": layerwise,
    "rewind": rewind,
    "finetune": finetune,
    "none": untrained,
}


def make_recovery(method: str, **settings: Any) -> Recovery:
    """Makes a recovery from its name and settings.

    Args:
        method: A name of `RECOVERIES`.
        settings: Settings of its `LearningCompression`, and ``rounds`` of ``iterative``.

    Raises:
        ValueError: If there is no such method, or a setting is refused.
    """
    if method not in RECOVERIES:
        raise ValueError(f"there is no recovery {method!r}; it must be one of {', '.join(RECOVERIES)}")
    if "rounds" in settings and method != "iterative":
        raise ValueError(f"rounds={settings['rounds']} goes with recovery 'iterative', not with {method!r}")
    return RECOVERIES[method](**settings)


def as_recovery(given: str | Recovery, epochs: float | None = None) -> Recovery:
    """A recovery from its name or as an object; if ``epochs`` is given, with that budget.

    Raises:
        ValueError: If ``given`` is neither, or the budget is refused.
    """
    recovery = make_recovery(given) if isinstance(given, str) else given
    if isinstance(recovery, type) or not isinstance(recovery, Recovery):
        names = ", ".join(RECOVERIES)
        raise ValueError(f"recovery={given!r:.100}; give a name ({names}) or one such as LearningCompression()")
    return recovery if epochs is None else with_settings(recovery, epochs=epochs)


def with_settings(recovery: Recovery, **settings: Any) -> Recovery:
    """The same recovery with other settings of its training, such as its budget.

    Raises:
        ValueError: If a value is refused.
    """
    if isinstance(recovery, Untrained):
        return untrained(**settings)
    if isinstance(recovery, Iterative | Layerwise):
        return replace(recovery, training=replace(recovery.training, **settings))
    return replace(recovery, **settings)  # type: ignore[type-var]  # recoveries are dataclasses


def suiting(recovery: Recovery, scheme: Scheme, train: Split) -> Recovery:
    """The recovery, with settings that are chosen by scheme and budget (``auto``) filled in."""
    return recovery.suiting(scheme, train) if isinstance(recovery, LearningCompression) else recovery


def settings_of(recovery: Recovery) -> dict[str, Any]:
    """The settings of a recovery and its training, and its ``method``: JSON types only."""
    settings: dict[str, Any] = asdict(recovery)  # type: ignore[call-overload]  # recoveries are dataclasses
    settings |= settings.pop("training", {})
    training = getattr(recovery, "training", recovery)
    if isinstance(training, LearningCompression):
        settings["lr"] = training.peak_lr
        settings["mu"] = "auto" if training.mu is None else training.mu
    plain = {name: "inf" if value == math.inf else value for name, value in settings.items()}
    return {"method": recovery.method, **plain}
