import copy
import math
from itertools import chain, islice

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autocompress.learning import training
from autocompress.learning.training import (
    WORTH_SHARING,
    Descent,
    Stream,
    TaughtStream,
    distillation_loss,
    fit,
    n_steps,
    one_cycle,
    recalibrate_batchnorm,
    threads_for,
)
from autocompress.splits import LoaderSplit, TensorSplit, as_split
from autocompress.task import Task


def numbered(n: int, batch_size: int) -> TensorSplit:
    return TensorSplit(torch.arange(float(n))[:, None], torch.arange(n), batch_size)


# The schedule


def test_one_cycle_at_points_of_its_closed_form() -> None:
    # Of 100 steps 10 rise: to 1/11, 2/11, ... of the peak; then half a cosine over the other 90.
    assert one_cycle(0, 100, 0.5) == pytest.approx(0.5 / 11)
    assert one_cycle(9, 100, 0.5) == pytest.approx(0.5 * 10 / 11)
    assert one_cycle(10, 100, 0.5) == pytest.approx(0.5)
    assert one_cycle(55, 100, 0.5) == pytest.approx(0.25)
    assert one_cycle(40, 100, 0.5) == pytest.approx(0.5 * 0.75)  # a third of the way down: cos 60° = 1/2
    assert one_cycle(70, 100, 0.5) == pytest.approx(0.5 * 0.25)
    assert one_cycle(100, 100, 0.5) == pytest.approx(0, abs=1e-12)
    assert one_cycle(3, 10, 1.0, warmup=0.0) == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_one_cycle_stays_between_zero_and_the_peak(steps: int) -> None:
    rates = [one_cycle(step, steps, 0.1) for step in range(steps)]
    assert all(0 < lr <= 0.1 for lr in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_descent_is_nesterov_sgd_along_the_cycle() -> None:
    w = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        w.weight.fill_(1.0)
    descent = Descent(w, steps=3, lr=0.1, momentum=0.9, weight_decay=0.5)
    value, velocity = 1.0, 0.0
    for step in range(3):
        assert descent.steps_left == 3 - step
        lr = descent.step((0.8 * w.weight).sum())
        assert lr == one_cycle(step, 3, 0.1)
        gradient = 0.8 + 0.5 * value
        velocity = 0.9 * velocity + gradient
        value -= lr * (gradient + 0.9 * velocity)
        assert float(w.weight.detach()) == pytest.approx(value, rel=1e-5)
    assert descent.steps_left == 0


@pytest.mark.parametrize(
    ("n", "batch_size", "epochs", "steps"),
    [
        (100, 10, 3, 30),
        (105, 10, 3, 30),
        (5, 10, 3, 3),
        (100, 10, 0.5, 5),
        (100, 10, 0.25, 2),
        (100, 10, 0.001, 1),
    ],
)
def test_steps_of_a_number_of_epochs(n: int, batch_size: int, epochs: float, steps: int) -> None:
    assert n_steps(numbered(n, batch_size), epochs) == steps


# Batches


def test_passes_are_each_shuffled_and_whole() -> None:
    split = numbered(12, 4)
    batches = [y.tolist() for _, y in islice(Stream(split, 0), 9)]
    passes = [list(chain(*batches[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_the_stream_is_deterministic() -> None:
    def first(seed: int) -> list[list[int]]:
        return [y.tolist() for _, y in islice(Stream(numbered(12, 4), seed), 7)]

    assert first(3) == first(3) != first(4)


class Counting(nn.Module):
    """A teacher that counts the samples it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)
        self.dropout = nn.Dropout(0.5)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.dropout(self.linear(x))


def test_the_teacher_sees_tensors_once() -> None:
    teacher, split = Counting().train(), numbered(12, 4)
    for x, y, taught in islice(TaughtStream(split, teacher, 0), 10):
        assert torch.equal(y, x[:, 0].long())
        torch.testing.assert_close(taught, teacher.linear(x).detach())
        assert taught is not None and not taught.requires_grad
    assert teacher.seen == 12
    assert teacher.training


def test_batches_with_and_without_a_teacher_are_the_same() -> None:
    plain = islice(Stream(numbered(12, 4), 0), 7)
    taught = islice(TaughtStream(numbered(12, 4), Counting(), 0), 7)
    untaught = islice(TaughtStream(numbered(12, 4), None, 0), 7)
    for (x, y), (tx, ty, _), (ux, uy, nothing) in zip(plain, taught, untaught, strict=True):
        assert torch.equal(x, tx) and torch.equal(y, ty)
        assert torch.equal(x, ux) and torch.equal(y, uy) and nothing is None


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_a_stream_can_be_taken_up_anywhere(taken: int) -> None:
    whole = Stream(numbered(12, 4), 3)
    for _ in islice(whole, taken):
        pass
    again = Stream(numbered(12, 4), 3, whole.epoch, whole.position)
    for (x, y), (ax, ay) in islice(zip(whole, again, strict=False), 7):
        assert torch.equal(x, ax) and torch.equal(y, ay)


def test_the_teacher_sees_every_batch_of_a_loader() -> None:
    """A loader may augment: yesterday's logits are not today's."""
    loader = DataLoader(TensorDataset(*next(numbered(12, 12).batches())), batch_size=4, shuffle=True)
    teacher = Counting().train()
    for x, y, taught in islice(TaughtStream(as_split(loader, "train"), teacher, 0), 6):
        assert torch.equal(y, x[:, 0].long())
        torch.testing.assert_close(taught, teacher.linear(x).detach())  # in eval mode: no dropout
    assert teacher.seen == 24
    assert teacher.training and teacher.dropout.training


# Distillation


def test_distillation_is_the_divergence_of_softened_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64) * 3
    for temperature in (1.0, 2.0, 4.0):
        q = (teacher / temperature).exp() / (teacher / temperature).exp().sum(1, keepdim=True)
        p = (student / temperature).exp() / (student / temperature).exp().sum(1, keepdim=True)
        by_hand = float((q * (q.log() - p.log())).sum(1).mean()) * temperature**2
        assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(by_hand, rel=1e-9)


def test_distillation_vanishes_at_the_teacher_with_its_gradient() -> None:
    teacher = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    student = (teacher + 3.0).requires_grad_()  # softmax does not see the shift
    loss = distillation_loss(student, teacher, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-6


def test_distillation_gradients_hardly_depend_on_the_temperature() -> None:
    """For small logits T² KL has the gradient of half the squared distance over the classes (Hinton et al.)."""
    student = (1e-3 * torch.randn(1, 5, dtype=torch.float64)).requires_grad_()
    teacher = 1e-3 * torch.randn(1, 5, dtype=torch.float64)
    away = (student - teacher).detach()
    expected = (away - away.mean()) / 5
    for temperature in (1.0, 4.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-7)


# Training and calibration


def test_fit_trains_deterministically(tiny_task: Task) -> None:
    models = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(tiny_task.model)
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                torch.manual_seed(7)
                layer.reset_parameters()
        untrained = tiny_task.evaluate(model, tiny_task.train).score
        split = TensorSplit(tiny_task.train.x, tiny_task.train.y, batch_size=12)
        fit(model, split, tiny_task.loss, epochs=12, lr=0.1, seed=seed)
        assert tiny_task.evaluate(model, tiny_task.train).score > max(0.8, untrained)
        assert not any(module.training for module in model.modules())
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])


def test_recalibration_equals_brute_force() -> None:
    """The statistics of the second layer are those of what the first one, in train mode, hands it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[0].momentum, model[2].momentum = 0.1, None
    x = 5 + 3 * torch.randn(32, 3)
    split = TensorSplit(x, torch.zeros(32, dtype=torch.long), batch_size=8)
    recalibrate_batchnorm(model, split)
    means, variances = [], []
    for batch, _ in split.batches():
        normed = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + 1e-5).sqrt()
        inner = model[1](normed).detach()
        means.append(inner.mean(0))
        variances.append(inner.var(0))
    torch.testing.assert_close(model[2].running_mean, torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[2].running_var, torch.stack(variances).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[0].running_mean, x.mean(0), atol=1e-5, rtol=1e-4)
    assert (model[0].momentum, model[2].momentum) == (0.1, None)
    assert not any(module.training for module in model.modules())


def test_recalibration_forgets_what_was_there() -> None:
    split = TensorSplit(torch.randn(16, 3), torch.zeros(16, dtype=torch.long))
    fresh, spoiled = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    spoiled.running_mean.fill_(1e6)
    for model in (fresh, spoiled):
        recalibrate_batchnorm(model, split)
    assert torch.equal(fresh.running_mean, spoiled.running_mean)


@pytest.mark.parametrize(("macs", "threads"), [(WORTH_SHARING - 1, 1), (WORTH_SHARING, 2)])
def test_small_batches_run_on_one_thread(macs: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(macs):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
        with threads_for(1, device="cuda"):
            assert torch.get_num_threads() == 2  # the GPU does the work
        with pytest.raises(RuntimeError), threads_for(1):
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_loader_that_serves_no_full_batch_is_an_error_and_not_a_hang() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(5, 2), torch.zeros(5).long()), batch_size=64, drop_last=True)
    with pytest.raises(ValueError, match="train= serves no full batch: 5 samples, 64 a batch"):
        next(Stream(LoaderSplit(loader), 0))


def test_one_bad_batch_moves_the_weights_by_no_more_than_the_clipped_gradient() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    lr = Descent(model, 10, lr=0.1, momentum=0.0, weight_decay=0.0).step(1e6 * model.weight.sum())
    assert float((model.weight.detach() - before).norm()) == pytest.approx(lr, rel=1e-4)


def test_descent_with_adamw_follows_its_update_rule() -> None:
    w = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        w.weight.fill_(1.0)
    descent = Descent(w, steps=3, lr=0.1, optimizer="adamw", momentum=0.9, weight_decay=0.5)
    value, first, second = 1.0, 0.0, 0.0
    for step in range(3):
        lr = descent.step((0.8 * w.weight).sum())
        value -= lr * 0.5 * value
        first, second = 0.9 * first + 0.1 * 0.8, 0.999 * second + 0.001 * 0.8**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        value -= lr * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
        assert float(w.weight.detach()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("is_fp16", [False, True])
def test_descent_leaves_out_a_bad_step_once_and_slows_down(is_fp16: bool) -> None:
    w = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        w.weight.fill_(1.0)
    descent = Descent(w, steps=10, lr=0.1, scaler=torch.amp.GradScaler("cpu", enabled=is_fp16))
    descent.step(w.weight.sum())
    before = float(w.weight.detach())
    descent.step(math.nan * w.weight.sum())
    assert float(w.weight.detach()) == before
    assert descent.step(w.weight.sum()) == pytest.approx(0.1 * one_cycle(2, 10, 0.1))
    assert float(w.weight.detach()) < before
    with pytest.raises(FloatingPointError, match=r"diverged \(loss inf\); try a smaller learning rate"):
        descent.step(math.inf * w.weight.sum())


def test_a_gradient_that_overflows_in_fp16_is_the_scalers_alone() -> None:
    w = nn.Linear(1, 1, bias=False)
    descent = Descent(w, steps=10, lr=0.1, scaler=torch.amp.GradScaler("cpu"))
    before = float(w.weight.detach())
    for _ in range(3):
        descent.step((0 * w.weight).sqrt().sum())  # a finite loss, of an infinite slope
    assert float(w.weight.detach()) == before and descent.slowed == 1


@pytest.mark.parametrize("power", [1, 2])
def test_descent_remembers_gradients_as_they_were_before_clipping(
    power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SCALED_BACK", 4)
    w = nn.Linear(2, 1, bias=False)
    descent = Descent(w, steps=10, lr=0.1)
    descent.step(w.weight.sum())
    assert descent.gradient_moments(power) == {}  # nobody has asked for them before
    expected, factors = torch.zeros(1, 2), []
    for gradient in 2 * (torch.tensor([[30.0, 40.0]]), torch.tensor([[0.1, -0.2]]), torch.tensor([[3.0, 0.5]])):
        descent.step((gradient * w.weight).sum())
        expected = 0.98 * expected + 0.02 * gradient**power
        found = descent.gradient_moments(power)["weight"]
        factors.append(float(found.norm() / expected.norm()))  # they are known up to a factor
        torch.testing.assert_close(found / factors[-1], expected)
    grown = 0.98**-3 / 0.02
    assert factors == pytest.approx([0.98**-2 / 0.02, grown, 1 / 0.02, 0.98**-1 / 0.02, 0.98**-2 / 0.02, grown])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_optimizer_goes_on_from_its_state(optimizer: str) -> None:
    def steps(descent: Descent, model: nn.Module, n: int) -> None:
        for _ in range(n):
            descent.step((model(torch.ones(1, 3)) - 1).square().sum())

    torch.manual_seed(0)
    whole = nn.Linear(3, 2)
    first = copy.deepcopy(whole)
    descent = Descent(whole, 8, lr=0.1, optimizer=optimizer)
    descent.gradient_moments(2)
    steps(descent, whole, 8)
    begun = Descent(first, 8, lr=0.1, optimizer=optimizer)
    begun.gradient_moments(2)
    steps(begun, first, 3)
    second = copy.deepcopy(first)
    resumed = Descent(second, 8, lr=0.1, optimizer=optimizer)
    resumed.load_state_dict(begun.state_dict(), begun.taken, begun.slowed)
    steps(resumed, second, 5)
    assert torch.equal(whole.weight, second.weight) and torch.equal(whole.bias, second.bias)
    assert torch.equal(descent.gradient_moments(2)["weight"], resumed.gradient_moments(2)["weight"])
