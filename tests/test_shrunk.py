"""Gradient steps on the network without its dead channels are those on the masked one."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autocompress.conformance.testing_models import INPUT_SHAPE, MODELS, lived_in
from autocompress.lc import LearningCompression
from autocompress.learning.learner import Learner, Penalty
from autocompress.learning.polish import freeze, frozen
from autocompress.learning.shrunk import Shrunk
from autocompress.recovery import make_recovery
from autocompress.scheme import Scheme, parse_scheme
from autocompress.task import Task


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners whose models are in double precision, in which rounding is no excuse."""

    def loss(self: Learner, x: Tensor, y: Tensor, taught: Tensor | None) -> Tensor:
        return nn.functional.cross_entropy(self.model(x.double()), y)

    monkeypatch.setattr(Learner, "_loss", loss)


def task_of(model: nn.Module) -> Task:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, *INPUT_SHAPE, generator=generator)
    y = torch.randint(0, 4, (48,), generator=generator)
    return Task(model, (x, y), (x, y), (x, y))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_steps_on_what_is_left_are_steps_on_the_masked_network(
    make: Callable[[], nn.Module], optimizer: str, in_double: None
) -> None:
    task = task_of(lived_in(make()))
    scheme = parse_scheme("StructPrune(criterion=l2, align=1)")
    facts = scheme.analyze(task.model, task.example_input)
    recipe = LearningCompression(steps=20, lr=0.01, mu=math.inf, optimizer=optimizer, distill=0.0)  # type: ignore[arg-type]
    masked, smaller = (Learner(recipe, copy.deepcopy(task.model).double(), task, 0) for _ in range(2))
    left = Shrunk(scheme, smaller)
    for density, steps in ((0.7, 3), (0.7, 2), (0.4, 4)):
        thetas = [freeze(scheme, learner.weights, density, facts) for learner in (masked, smaller)]
        assert thetas[0].plan == thetas[1].plan and left._realized(thetas[1].plan, facts) is not None
        expected = masked.l_step(steps, frozen(scheme, thetas[0]))
        assert left.l_step(steps, frozen(scheme, thetas[1]), thetas[1].plan, facts) == pytest.approx(expected)
        assert smaller.descent.taken == masked.descent.taken
        for name, w in masked.weights.items():
            torch.testing.assert_close(smaller.weights[name], w)
        kept = thetas[0].support
        ours, theirs = smaller.descent.state_dict(), masked.descent.state_dict()
        assert ours.keys() == theirs.keys()
        for entry, value in theirs.items():
            stays = kept.get(entry.partition("/")[2], torch.tensor(True)) if value.dim() else True
            torch.testing.assert_close(ours[entry] * stays, value * stays)
        batchnorm = {n: t for n, t in masked.model.named_buffers() if n.endswith("num_batches_tracked")}
        assert all(torch.equal(smaller.model.get_buffer(n), t) for n, t in batchnorm.items())
    for model in (masked.model, smaller.model):
        model.eval()
    x = torch.randn(5, *INPUT_SHAPE, dtype=torch.float64)
    torch.testing.assert_close(smaller.model(x), masked.model(x))


@pytest.mark.parametrize(
    "spec",
    [
        "StructPrune",
        "FilterPrune",
        "StructPrune + Quantize16",
        "StructPrune(criterion=l2)",
        "StructPrune(criterion=taylor)",
    ],
)
def test_a_recovery_is_quicker_and_comes_to_the_same(
    spec: str, tiny_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    inner = Learner.l_step

    def l_step(self: Learner, steps: int, penalty: Penalty) -> float:
        sizes.append(sum(p.numel() for p in self.model.parameters()))
        return inner(self, steps, penalty)

    monkeypatch.setattr(Learner, "l_step", l_step)
    scheme = parse_scheme(spec)
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)

    def recovered() -> tuple[list[int], dict[str, Tensor]]:
        sizes.clear()
        model = copy.deepcopy(tiny_task.model)
        make_recovery("gradual", steps=24, c_steps=6, lr=0.001).recover(model, scheme, facts, 0.3, tiny_task, 0)
        return list(sizes), model.state_dict()

    shrinking, found = recovered()
    whole = sum(p.numel() for p in tiny_task.model.parameters())
    assert shrinking == sorted(shrinking, reverse=True) and shrinking[-1] <= 0.3 * whole < shrinking[0]
    monkeypatch.setattr(Shrunk, "_realized", lambda *_: None)
    masked, expected = recovered()
    assert set(masked) == {whole} and len(masked) == len(shrinking)
    for name, value in expected.items():
        if not name.endswith(("running_mean", "running_var")):  # of dead channels
            torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-3)


class Changed:
    """A scheme whose realized network is another's with something done to it."""

    hard = True
    takes_density = True

    def __init__(self, inner: Scheme, change: Callable[[nn.Module], object]) -> None:
        self.inner, self.change = inner, change

    def realize(self, model: nn.Module, theta: object, facts: object) -> nn.Module:
        realized = self.inner.realize(model, theta, facts)  # type: ignore[arg-type]
        with torch.no_grad():
            self.change(realized)
        return realized


def swap(model: nn.Module) -> None:
    """Has each layer's channels in another order: no slice of it."""
    for p in model.parameters():
        p.copy_(p.flip(0))


def renumber(model: nn.Module) -> None:
    """Changes whole numbers, as those of the channels that a layer takes would be."""
    for buffer in model.buffers():
        if not buffer.is_floating_point():
            buffer.add_(1)


def leave_out(model: nn.Module) -> None:
    """Has no tensor any more where the larger network has one."""
    next(m for m in model.modules() if isinstance(m, nn.Linear)).bias = None


def test_what_cannot_be_told_to_be_a_part_of_the_network_is_trained_masked(tiny_task: Task) -> None:
    scheme = parse_scheme("StructPrune")
    facts = scheme.analyze(tiny_task.model, tiny_task.example_input)
    gradual = LearningCompression(steps=9, mu=math.inf)

    def is_shrunk(scheme: Scheme, recipe: LearningCompression = gradual, density: float = 0.4) -> bool:
        learner = Learner(recipe, copy.deepcopy(tiny_task.model), tiny_task, 0)
        plan = freeze(parse_scheme("StructPrune(criterion=l2)"), learner.weights, density, facts).plan
        return Shrunk(scheme, learner)._realized(plan, facts) is not None

    assert is_shrunk(scheme)
    assert not is_shrunk(scheme, density=1.0)  # nothing is gone
    assert not is_shrunk(scheme, LearningCompression(steps=9, mu=math.inf, compile=True))
    for change in (swap, renumber, leave_out):
        assert not is_shrunk(Changed(scheme, change))  # type: ignore[arg-type]
    assert not is_shrunk(parse_scheme("Prune"))
    assert not is_shrunk(parse_scheme("Quantize8"))  # hard, but it removes nothing
