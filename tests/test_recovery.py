import copy
import json
import math
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from autocompress import schemes
from autocompress.gauges.macs import count_params
from autocompress.lc import LearningCompression
from autocompress.learning.learner import Learner, Penalty
from autocompress.learning.state import State
from autocompress.learning.training import Descent
from autocompress.recovery import (
    RECOVERIES,
    Iterative,
    Recovery,
    make_recovery,
    settings_of,
    suiting,
    with_settings,
)
from autocompress.scheme import Scheme, parse_scheme
from autocompress.splits import TensorSplit
from autocompress.task import Task

# By magnitude: without a look at data.
Prune = partial(schemes.Prune, criterion="l2")
StructPrune = partial(schemes.StructPrune, criterion="l2", normalize="mean")

TRAINED = [name for name in RECOVERIES if name != "none"]


class Steps:
    """Counts the gradient steps of L steps, and what each held fixed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self.rates: list[float] = []
        self.bound: list[list[str]] = []
        l_step = Learner.l_step

        def counting(learner: Learner, steps: int, penalty: Penalty) -> float:
            before = learner.descent.taken
            loss = l_step(learner, steps, penalty)
            self.taken += learner.descent.taken - before
            self.bound.append([name for name, bound in penalty.bound.items() if bound.any()])
            return loss

        monkeypatch.setattr(Learner, "l_step", counting)


def small_batches(task: Task) -> Task:
    x, y = task.train.x, task.train.y
    return Task(task.model, TensorSplit(x, y, 12), (x, y), (x, y))


def recovered(recovery: Recovery, scheme: Scheme, density: float, task: Task) -> tuple[nn.Module, float]:
    facts = scheme.analyze(task.model, task.example_input)
    model = copy.deepcopy(task.model)
    found = recovery.recover(model, scheme, facts, density, task, 0)
    for name, kept in found.theta.support.items():
        assert not dict(model.named_parameters())[name].detach()[~kept].any(), name
    return model, found.theta.kept / count_params(task.model)


@pytest.mark.parametrize("scheme", [Prune(), StructPrune()])
@pytest.mark.parametrize("method", RECOVERIES)
def test_every_recovery_meets_the_density_in_its_budget(
    tiny_task: Task, method: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, steps = small_batches(tiny_task), Steps(monkeypatch)
    recovery = make_recovery(method, **({} if method == "none" else {"epochs": 3.5, "lr": 0.02}))
    model, density = recovered(recovery, scheme, 0.4, task)
    assert 0.2 < density <= 0.4
    assert steps.taken == recovery.n_steps(task.train) == (0 if method == "none" else round(3.5 * 5))
    assert all(p.isfinite().all() for p in model.state_dict().values())


@pytest.mark.parametrize("method", TRAINED)
def test_training_is_worth_its_epochs(tiny_task: Task, method: str) -> None:
    """Each gets nearer to the labels than the same compression without training."""
    task = small_batches(tiny_task)
    losses = []
    for recovery in (make_recovery("none"), make_recovery(method, epochs=20)):
        model, _ = recovered(recovery, StructPrune(), 0.2, task)
        with torch.no_grad():
            losses.append(float(task.loss(model.eval()(task.train.x), task.train.y)))
    assert losses[1] < 0.8 * losses[0]


def test_gradual_pruning_never_revives_a_weight(tiny_task: Task) -> None:
    states: list[Tensor] = []

    def keep(state: State) -> None:
        if state.penalty.bound:  # there is none after the polish
            states.append(torch.cat([bound.flatten() for bound in state.penalty.bound.values()]))

    facts = Prune().analyze(tiny_task.model, tiny_task.example_input)
    recovery = make_recovery("gradual", epochs=6, c_steps=4)
    model = copy.deepcopy(tiny_task.model)
    recovery.recover(model, Prune(), facts, 0.3, tiny_task, 0, checkpoint=keep)
    shares = [float(bound.float().mean()) for bound in states]
    assert len(shares) > 2
    assert shares == sorted(shares) and shares[0] < shares[-1]
    for earlier, later in pairwise(states):
        assert not (earlier & ~later).any()


@pytest.mark.parametrize("scheme", ["Prune", "StructPrune"])
def test_gradients_are_those_of_the_pruned_weights(
    tiny_task: Task, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    kept: list[int] = []
    loss = Learner._loss

    def counting(learner: Learner, *batch: Tensor) -> Tensor:
        kept.append(sum(int(w.count_nonzero()) for w in learner.weights.values()))
        return loss(learner, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "_loss", counting)
    recovered(make_recovery("gradual", steps=12, c_steps=3), parse_scheme(scheme), 0.3, tiny_task)
    falling = list(dict.fromkeys(kept))
    assert kept == [n for n, times in zip(falling, (2, 2, 8), strict=True) for _ in range(times)]
    assert falling == sorted(falling, reverse=True) and falling[0] < count_params(tiny_task.model)


def test_one_shot_prunes_what_was_smallest_in_the_dense_model(tiny_task: Task) -> None:
    weights = {name: p.detach() for name, p in tiny_task.model.named_parameters()}
    facts = Prune().analyze(tiny_task.model, tiny_task.example_input)
    expected = Prune().pi(weights, 0.3, facts).support
    for method in ("rewind", "finetune", "layerwise"):
        model, _ = recovered(make_recovery(method, epochs=2, lr=0.01), Prune(), 0.3, small_batches(tiny_task))
        for name, kept in expected.items():
            assert torch.equal(dict(model.named_parameters())[name] != 0, kept), (method, name)


def test_iterative_pruning_lowers_the_density_by_the_same_factor_in_every_round(tiny_task: Task) -> None:
    asked = []

    class Watched(schemes.StructPrune):
        def pi(self, weights, density, facts):  # type: ignore[no-untyped-def]
            asked.append(density)
            return super().pi(weights, density, facts)

    recovered(
        Iterative(make_recovery("rewind", epochs=2, lr=0.02), rounds=3), Watched(), 0.216, small_batches(tiny_task)
    )
    assert [density for density, _ in groupby(asked)] == pytest.approx([0.6, 0.36, 0.216])


def test_layerwise_pruning_goes_from_the_first_layer_to_the_last(
    tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    recovered(make_recovery("layerwise", epochs=4, lr=0.02), StructPrune(), 0.3, tiny_task)
    assert len(steps.bound) >= 3
    order = [name for name, _ in tiny_task.model.named_parameters()]
    for fewer, more in pairwise(steps.bound):
        assert set(fewer) < set(more)
        added = set(more) - set(fewer)
        assert min(map(order.index, added)) > max(map(order.index, fewer))


@pytest.mark.parametrize("method", TRAINED)
def test_settings_are_plain_and_make_the_same_recovery_again(method: str) -> None:
    given = {"lr": 0.03, "distill": 0.25, "optimizer": "adamw"}
    given |= {"rounds": 6} if method == "iterative" else {}
    recovery = with_settings(make_recovery(method, **given), epochs=7.0)
    settings = json.loads(json.dumps(settings_of(recovery), allow_nan=False))
    assert settings["method"] in RECOVERIES
    assert settings["epochs"] == 7.0
    again = make_recovery(settings["method"], **{name: settings[name] for name in given})
    assert with_settings(again, epochs=settings["epochs"]) == recovery


def test_the_optimizer_settles_the_learning_rate_where_none_is_given() -> None:
    assert settings_of(make_recovery("lc"))["lr"] == 0.1
    assert settings_of(make_recovery("lc", optimizer="adamw"))["lr"] == 0.001
    assert settings_of(make_recovery("finetune", optimizer="adamw"))["lr"] == 0.0001
    assert settings_of(with_settings(make_recovery("iterative"), optimizer="adamw"))["lr"] == 0.001
    assert settings_of(make_recovery("gradual", lr=0.3, optimizer="adamw"))["lr"] == 0.3


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("StructPrune", "gradual"),
        ("FilterPrune", "gradual"),
        ("Prune", "lc"),
        ("LowRank", "lc"),
        ("StructPrune+Quantize16", "gradual"),
        ("StructPrune+Quantize8", "gradual"),
        ("StructPrune+Quantize8(bits=2)", "lc"),  # two bits are too few to round to at the end alone
        ("Prune+Quantize8", "lc"),
    ],
)
def test_auto_is_gradual_where_channels_are_removed_and_lc_elsewhere(
    tiny_task: Task, scheme: str, method: str
) -> None:
    found, train = parse_scheme(scheme), tiny_task.train
    assert suiting(make_recovery("auto", steps=400), found, train).method == method
    for explicit in RECOVERIES:
        if explicit != "auto":
            assert suiting(make_recovery(explicit), found, train).method == explicit.replace("finetune", "rewind")
    assert suiting(LearningCompression(mu=3.0), found, train).method == "lc"


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("Prune", "gradual"),
        ("Prune+Quantize8", "gradual"),
        ("Prune+Quantize8(bits=2)", "lc"),  # a rounded weight that is held where it is would not be trained
        ("Quantize8(bits=2)", "lc"),
        ("LowRank", "lc"),  # nor would factors be
    ],
)
def test_auto_sets_single_weights_to_zero_at_once_where_a_c_step_has_one_gradient_step(
    tiny_task: Task, scheme: str, method: str
) -> None:
    found, train = parse_scheme(scheme), tiny_task.train
    assert suiting(make_recovery("auto", steps=40, c_steps=12), found, train).method == "lc"  # 24 steps alternate
    assert suiting(make_recovery("auto", steps=39, c_steps=12), found, train).method == method  # 23 do
    assert suiting(make_recovery("lc", steps=39, c_steps=12), found, train).method == "lc"


@pytest.mark.parametrize(
    ("method", "scheme", "steps", "while_alternating", "in_the_polish"),
    [
        ("auto", "Prune", 10, 5.0, 5.0),
        ("auto", "StructPrune", 10, 1.0, 1.0),
        ("lc", "StructPrune", 10, 5.0, 5.0),
        ("gradual", "Prune", 10, 5.0, 5.0),
        ("lc", "Prune", 9, 1.0, 5.0),  # 5 steps alternate, which is one for each of 3 C steps
        ("auto", "Prune", 9, 5.0, 5.0),  # where that is gradual
        ("rewind", "Prune", 9, None, 5.0),
    ],
)
def test_gradients_are_clipped_at_the_norm_that_suits_scheme_and_step(
    tiny_task: Task,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    scheme: str,
    steps: int,
    while_alternating: float | None,
    in_the_polish: float,
) -> None:
    norms: dict[bool, set[float]] = {}
    step = Descent.step

    def noting(descent: Descent, loss: Tensor, *rest: object) -> float:
        lr = step(descent, 1e6 * loss, *rest)  # type: ignore[arg-type]
        gradients = [p.grad.norm() for p in descent._trainable if p.grad is not None]
        norms.setdefault(descent.remembers, set()).add(round(float(torch.stack(gradients).norm()), 3))
        return lr

    monkeypatch.setattr(Descent, "step", noting)
    recovered(make_recovery(method, steps=steps, c_steps=3), parse_scheme(scheme), 0.3, small_batches(tiny_task))
    assert norms.get(True) == (None if while_alternating is None else {while_alternating})
    assert norms[False] == {in_the_polish}
    norms.clear()
    chosen = make_recovery(method, steps=10, c_steps=3, max_gradient=2.0)
    recovered(chosen, parse_scheme(scheme), 0.3, small_batches(tiny_task))
    assert set.union(*norms.values()) == {2.0}


def test_auto_asks_a_scheme_of_somebody_elses(tiny_task: Task) -> None:
    @dataclass(frozen=True)
    class Theirs(schemes.Prune):
        hard: ClassVar[bool] = True

    task, weights = small_batches(tiny_task), {}
    for method, scheme in (("auto", Theirs()), ("gradual", schemes.Prune()), ("auto", schemes.Prune())):
        model, _ = recovered(make_recovery(method, epochs=3, c_steps=3, max_gradient=1.0), scheme, 0.3, task)
        weights[method, type(scheme)] = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs, gradual, ours = weights.values()
    assert torch.equal(theirs, gradual)
    assert not torch.equal(theirs, ours)


def test_unknown_methods_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no recovery 'magic'; it must be one of auto, lc, gradual"):
        make_recovery("magic")
    with pytest.raises(ValueError, match="lr=-1; it must be positive"):
        make_recovery("gradual", lr=-1)
    with pytest.raises(ValueError, match="rounds=0; it must be at least 1"):
        make_recovery("iterative", rounds=0)
    with pytest.raises(ValueError, match="rounds=3 goes with recovery 'iterative', not with 'lc'"):
        make_recovery("lc", rounds=3)
    with pytest.raises(ValueError, match="recovery 'none' trains nothing; leave it out"):
        make_recovery("none", lr=0.1)
    with pytest.raises(ValueError, match="epochs=3 is of training"):
        with_settings(make_recovery("none"), epochs=3)
    assert settings_of(make_recovery("none")) == {"method": "none"}


def test_a_recovery_says_what_it_is() -> None:
    assert LearningCompression().method == "auto"
    assert make_recovery("lc").method == LearningCompression(mu=3.0).method == "lc"
    assert LearningCompression(mu=math.inf).method == "gradual"
    assert make_recovery("finetune").method == make_recovery("rewind").method == "rewind"
    assert [make_recovery(name).method for name in ("iterative", "layerwise", "none")] == [
        "iterative",
        "layerwise",
        "none",
    ]
