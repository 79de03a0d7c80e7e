import copy
import math
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import nn

from autocompress.certify import drop_standard_error
from autocompress.gauges.macs import count_macs, count_params
from autocompress.goal import as_objective
from autocompress.lc import LearningCompression
from autocompress.learning.state import Recovered
from autocompress.scheme import Compose, Facts, Theta, parse_scheme
from autocompress.schemes import Prune, Quantize16, StructPrune
from autocompress.task import Task
from autocompress.testing import fingerprint, masked_model, run
from autocompress.trial import REMAINS, Bound, RealizationError, Start, TrialResult, TrialSpec, realize, run_trial

MakeSpec = Callable[..., TrialSpec]


def same(a: TrialResult, b: TrialResult) -> bool:
    """Whether two results are equal bit for bit, apart from the seconds they took."""
    assert a.model is not None and b.model is not None
    weights = zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True)
    without = [replace(result, model=None, seconds=0.0) for result in (a, b)]
    return without[0] == without[1] and all(n == m and torch.equal(v, w) for (n, v), (m, w) in weights)


@pytest.mark.parametrize("scheme", ["StructPrune", "Prune", "Quantize16", "StructPruneQuantize16"])
def test_a_trial_is_a_pure_function_of_its_spec(make_spec: MakeSpec, tiny_task: Task, scheme: str) -> None:
    tiny_task.model.train()
    tiny_task.model[1].eval()
    spec = make_spec(scheme=parse_scheme(scheme), density=0.5 if "Prune" in scheme else 1.0)
    before = fingerprint(tiny_task.model)
    first = run_trial(spec)
    torch.manual_seed(99)  # the state of the global generator is nobody's business
    assert same(run_trial(spec), first)
    assert fingerprint(tiny_task.model) == before


def test_a_trial_from_the_dense_model_leaves_starts_for_others(make_spec: MakeSpec, tiny_task: Task) -> None:
    recovery = LearningCompression(steps=40, c_steps=8, lr=0.05)
    cold = run_trial(make_spec(cheap=True, density=0.2, recovery=recovery, bound=Bound(0.9)))
    assert (cold.start, cold.start_density, cold.steps) == (None, 1.0, 40)
    assert cold.feasible and sorted(cold.starts)[0] == 0.2
    assert 1 <= sum(d > 0.2 for d in cold.starts) <= 2 and all(0.4 <= d <= 0.7 for d in cold.starts if d > 0.2)
    assert all(weights.keys() == tiny_task.model.state_dict().keys() for weights in cold.starts.values())

    start = Start(1, 0.2, cold.starts[0.2])
    spec = make_spec(2, density=0.15, cheap=True, recovery=recovery, bound=Bound(0.9), start=start)
    warm = run_trial(spec)
    assert (warm.start, warm.start_density) == (1, 0.2)
    assert warm.density <= 0.15 and warm.steps == recovery.shortened(0.2, 0.15, tiny_task.train).steps < 15
    assert list(warm.starts) == [0.15]
    assert same(run_trial(spec), warm)
    assert run_trial(replace(spec, cheap=False, start=None)).starts == {}


def test_the_whole_budget_decides_whether_weights_are_drawn_and_the_record_says_so(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    mus: list[float | None] = []
    recover = LearningCompression.recover

    def noting(self: LearningCompression, *args: Any, **settings: Any) -> Recovered:
        mus.append(self.mu)
        return recover(self, *args, **settings)

    monkeypatch.setattr(LearningCompression, "recover", noting)
    enough, hasty = LearningCompression(steps=40, c_steps=8), LearningCompression(steps=12, c_steps=8)
    cold = make_spec(cheap=True, density=0.3, scheme=parse_scheme("Prune"), recovery=enough, bound=Bound(0.99))
    first = run_trial(cold)
    start = Start(1, 0.3, first.starts[0.3])
    warm = replace(cold, density=0.25, start=start)
    shortened = enough.shortened(0.3, 0.25, cold.task.train)
    assert shortened.schedule(shortened.n_steps(cold.task.train))[1] == 1  # and is drawn all the same
    results = [first, run_trial(warm), run_trial(replace(cold, recovery=hasty))]
    assert mus == [1.0, 1.0, math.inf]
    assert [result.recovery for result in results] == ["lc", "lc", "gradual"]


def test_a_trial_that_cannot_make_it_is_given_up_and_never_feasible(make_spec: MakeSpec) -> None:
    recovery = LearningCompression(steps=40, c_steps=8, lr=1e-4)  # it does not recover
    result = run_trial(make_spec(cheap=True, density=0.15, recovery=recovery, bound=Bound(0.0)))
    assert result.rejected and not result.feasible and result.standing == "rejected"
    assert result.given_up_at == 0.5 and result.steps == 32
    assert 0.15 not in result.starts
    least, se = result.effective_drop(0.0)
    assert (least, se) == (REMAINS * result.drop, REMAINS * result.drop_se)
    assert least > 0
    allowed = run_trial(make_spec(cheap=True, density=0.15, recovery=recovery, bound=Bound(0.9)))
    assert not allowed.rejected and allowed.steps == 40


def test_another_seed_is_another_trial(make_spec: MakeSpec) -> None:
    assert not same(run_trial(make_spec(seed=1)), run_trial(make_spec(seed=2)))


def test_a_result_says_what_its_model_does(make_spec: MakeSpec, tiny_task: Task) -> None:
    spec = make_spec(number=7, density=0.45, objectives=(as_objective("macs"),))
    result = run_trial(spec)
    assert result.model is not None and not any(m.training for m in result.model.modules())
    evaluation = tiny_task.evaluate(result.model, tiny_task.val)
    assert (result.number, result.density_asked) == (7, 0.45)
    assert result.density == count_params(result.model) / count_params(tiny_task.model) <= 0.45
    assert result.density == result.measurement.density
    assert result.score == evaluation.score
    assert result.drop == pytest.approx(spec.dense.score - evaluation.score)
    assert result.drop_se == drop_standard_error(tiny_task.metric, spec.dense, evaluation)
    assert result.value == count_macs(result.model, tiny_task.example_input)
    assert result.measurement.latency == ()  # nothing was timed: the objective did not ask
    assert result.seconds > 0
    assert {len(values) for values in result.curves.values()} == {2}
    rebuilt = StructPrune().realize(tiny_task.model, Theta({}, {}, 0, result.plan), spec.facts)
    rebuilt.load_state_dict(result.model.state_dict())
    x = tiny_task.example_input  # the layouts in memory differ, and so may the last bit
    torch.testing.assert_close(run(rebuilt.eval(), x), run(result.model, x), rtol=1e-5, atol=1e-5)


def test_unstructured_density_counts_what_is_not_zero(make_spec: MakeSpec, tiny_task: Task) -> None:
    result = run_trial(make_spec(scheme=Prune(), density=0.4))
    assert result.model is not None
    nonzero = sum(int(p.count_nonzero()) for p in result.model.parameters())
    assert result.measurement.params == int(0.4 * count_params(tiny_task.model)) >= nonzero
    assert count_params(result.model) == count_params(tiny_task.model)


def test_feasible_is_within_the_bound_absolute_or_relative(make_spec: MakeSpec) -> None:
    absolute = run_trial(make_spec(density=0.2, recovery=LearningCompression(epochs=1)))
    assert absolute.drop > 0
    dense = make_spec().dense.score
    relative = run_trial(
        make_spec(density=0.2, recovery=LearningCompression(epochs=1), bound=Bound(absolute.drop, relative=True))
    )
    assert relative.drop == pytest.approx(absolute.drop / dense)
    assert relative.drop_se == pytest.approx(absolute.drop_se / dense)
    for max_drop, feasible in ((absolute.drop, True), (absolute.drop - 1e-6, False)):
        spec = make_spec(density=0.2, recovery=LearningCompression(epochs=1), bound=Bound(max_drop))
        assert run_trial(spec).feasible is feasible


@pytest.mark.parametrize("max_drop", [-0.01, 1.0, 1.5, float("nan")])
def test_bounds_out_of_range_are_refused(max_drop: float) -> None:
    with pytest.raises(ValueError, match=f"max_drop={max_drop}; it must be at least 0 and below 1"):
        Bound(max_drop)


@dataclass(frozen=True)
class Broken(StructPrune):
    """Takes the channels out and then moves what is left by ``shift``."""

    shift: float = 1.0

    def realize(self, model: nn.Module, theta: Theta, facts: Facts) -> nn.Module:
        model = super().realize(model, theta, facts)
        with torch.no_grad():
            model[-1].bias += self.shift
        return model


@pytest.mark.parametrize("shift", [1.0, 0.01, float("nan")])
def test_a_realized_model_that_computes_something_else_is_refused(make_spec: MakeSpec, shift: float) -> None:
    with pytest.raises(
        RealizationError, match=r"realized by Broken is off by .*allowed: 1e-05.*not used"
    ) as refused:
        run_trial(make_spec(scheme=Broken(shift=shift)))
    assert "\n" not in str(refused.value)


def test_each_part_of_a_composition_is_held_to_its_own_tolerance(make_spec: MakeSpec, tiny_task: Task) -> None:
    """An error that 16 bits would be allowed is found in the part before them."""
    with pytest.raises(RealizationError, match="realized by Broken"):
        run_trial(make_spec(scheme=Compose(Broken(shift=0.01), Quantize16())))


def test_realize_checks_and_leaves_the_masked_model(tiny_task: Task) -> None:
    scheme, model = StructPrune(criterion="l2"), tiny_task.model
    facts = scheme.analyze(model, tiny_task.example_input)
    theta = scheme.pi({name: p.detach() for name, p in model.named_parameters()}, 0.4, facts)
    masked = masked_model(scheme, model, theta)
    before = copy.deepcopy(masked.state_dict())
    batch = next(tiny_task.val.batches())[0]
    realized = realize(scheme, masked, theta, facts, batch)
    torch.testing.assert_close(run(realized, batch), run(masked, batch), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in masked.state_dict().items())


def test_an_objective_that_fails_says_so(make_spec: MakeSpec) -> None:
    with pytest.raises(ValueError, match="the objective 'fails' raised KeyError"):
        run_trial(make_spec(objectives=(as_objective(fails),)))


def fails(measurement: object) -> float:
    raise KeyError("x")


def test_results_survive_pickle(make_spec: MakeSpec) -> None:
    result = run_trial(make_spec())
    assert same(pickle.loads(pickle.dumps(result)), result)


@pytest.mark.slow  # two processes that import torch
def test_a_trial_in_another_process_is_the_same(make_spec: MakeSpec) -> None:
    specs = [make_spec(number=n, objectives=(as_objective(attrgetter("density")),)) for n in (1, 2)]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawned, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        elsewhere = list(pool.map(run_trial, specs))
    assert all(same(result, run_trial(spec)) for result, spec in zip(elsewhere, specs, strict=True))


# What runs out


class Hungry:
    """A loss that takes more memory than there is for batches beyond a size."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, set[int]()

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(targets))
        if len(targets) > self.most:
            torch.empty(2**60, dtype=torch.uint8)
        return torch.nn.functional.cross_entropy(logits, targets)


def test_out_of_memory_halves_the_batch_once(make_spec, tiny_task) -> None:
    tiny_task.loss = Hungry(30)
    result = run_trial(make_spec(task=tiny_task))
    assert tiny_task.loss.sizes == {60, 30}
    assert result.curves["batch_size"] == (30.0,)
    tiny_task.loss = Hungry(29)
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory, in batches of 30 as well: .*allocate"):
        run_trial(make_spec(task=tiny_task))
    assert tiny_task.loss.sizes == {60, 30}


def test_half_batches_hold_the_same_samples(tiny_task) -> None:
    halved, model = tiny_task.in_half_batches(), tiny_task.model
    assert [len(y) for _, y in halved.val.batches()] == [30, 30]
    assert halved.evaluate(model, halved.val).score == tiny_task.evaluate(model, tiny_task.val).score
    shuffled = torch.cat([x for x, _ in halved.train.batches(torch.Generator().manual_seed(0))])
    assert torch.equal(shuffled, next(tiny_task.train.batches(torch.Generator().manual_seed(0)))[0])


def test_a_metric_that_is_no_number_fails_the_trial(make_spec, tiny_task) -> None:
    spec = make_spec()
    tiny_task.metric = replace(tiny_task.metric, score=lambda targets, outputs: float("nan"))
    with pytest.raises(FloatingPointError, match="the accuracy of the compressed model is nan"):
        run_trial(spec)
