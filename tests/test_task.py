import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from autocompress.metrics import balanced_accuracy
from autocompress.splits import LoaderSplit, TensorSplit, as_split, kept_on
from autocompress.task import Task, as_task, device_of, evaluating, predict


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    return torch.arange(n * 3.0).view(n, 3), torch.arange(n) % 2


def loader(n: int = 10, **options: object) -> DataLoader:
    return DataLoader(TensorDataset(*data(n)), batch_size=4, **options)


def test_tensor_split_in_order_serves_every_sample_once() -> None:
    split = TensorSplit(*data(), batch_size=4)
    batches = list(split.batches())
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), split.x)
    assert torch.equal(torch.cat([y for _, y in batches]), split.y)


def test_tensor_split_shuffled_drops_the_last_and_keeps_pairs() -> None:
    split = TensorSplit(*data(), batch_size=4)
    batches = list(split.batches(torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in batches] == [4, 4]
    served = torch.cat([x[:, 0] for x, _ in batches]) / 3
    assert len(set(served.tolist())) == 8
    assert served.tolist() != sorted(served.tolist())
    assert torch.equal(torch.cat([y for _, y in batches]), served.long() % 2)
    again = list(split.batches(torch.Generator().manual_seed(0)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_fewer_samples_than_a_batch_are_one_batch() -> None:
    split = TensorSplit(*data(3), batch_size=64)
    assert [len(x) for x, _ in split.batches()] == [3]
    assert [len(x) for x, _ in split.batches(torch.Generator().manual_seed(0))] == [3]


def test_loader_split_serves_what_the_loader_serves() -> None:
    split = as_split(loader(), "train")
    assert isinstance(split, LoaderSplit)
    assert (split.n_samples, split.batch_size) == (10, 4)
    assert [len(x) for x, _ in split.batches()] == [4, 4, 2]


def test_a_generator_seeds_the_loaders_own_shuffling() -> None:
    split = as_split(loader(shuffle=True), "train")

    def order(seed: int) -> list[float]:
        return torch.cat([x[:, 0] for x, _ in split.batches(torch.Generator().manual_seed(seed))]).tolist()

    assert order(0) == order(0) != order(1)
    assert len(set(order(0))) == 8  # the last batch of two is left out, as tensors leave it out
    assert set(order(0)) <= set(data()[0][:, 0].tolist())


def test_three_forms_of_data_make_the_same_task() -> None:
    model = nn.Linear(3, 2)
    pairs, loaders, splits = data(), loader(), TensorSplit(*data())
    scores = {
        Task(model, form, form, form).evaluate(model, as_split(form, "val")).score
        for form in (pairs, loaders, splits)
    }
    assert len(scores) == 1
    assert Task(model, splits, splits, splits).train is splits


def test_on_the_cpu_a_split_stays_what_it_is() -> None:
    for split in (TensorSplit(*data()), LoaderSplit(loader())):
        assert kept_on(split, torch.device("cpu")) is split


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_fits_is_kept_on_the_gpu_and_served_in_the_same_order() -> None:
    split, device = TensorSplit(*data(), batch_size=4), torch.device("cuda")
    kept = kept_on(split, device)
    orders = (torch.Generator().manual_seed(3) for _ in range(2))
    for (x, y), (on_gpu, y_on_gpu) in zip(
        *(s.batches(g) for s, g in zip((split, kept), orders, strict=True)), strict=True
    ):
        assert on_gpu.is_cuda and torch.equal(x, on_gpu.cpu()) and torch.equal(y, y_on_gpu.cpu())


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ([1, 2], r"val= must be a DataLoader, or a pair \(x, y\) of tensors or numpy arrays, not a list"),
        (None, "val= must be .*not a NoneType"),
        ((torch.zeros(3, 2), torch.zeros(4)), "^val=: x holds 3 samples and y 4"),
        ((torch.zeros(0, 2), torch.zeros(0)), "^val=: there are no samples; train, val and test need some each"),
    ],
)
def test_other_forms_are_refused(form: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(nn.Linear(3, 2), data(), form, data())


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(ValueError, match=r"model=.resnet18.; it must be a torch\.nn\.Module"):
        Task("resnet18", data(), data(), data())


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what people have
        return nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(3, 2)))


def with_an_old_mask() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (scripted, r"the model is TorchScript \(at '1'\), .*; pass the module that it was scripted"),
        (lambda: nn.DataParallel(nn.Linear(3, 2)), "wrapped in DataParallel; pass what is inside, model.module"),
        pytest.param(
            lambda: torch.compile(nn.Linear(3, 2)),
            "torch.compile; pass what it was made from, model._orig_mod",
            marks=pytest.mark.slow,  # its import
        ),
        (lambda: nn.LazyLinear(2), "the model's weight has no shape yet; run a batch through"),
        (lambda: nn.Linear(3, 2).bfloat16(), "weight is of type torch.bfloat16; .* convert it with model.float()"),
        (with_an_old_mask, r"cannot be copied, .*torch.nn.utils.prune.remove"),
    ],
)
def test_a_model_that_cannot_be_changed_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(make(), data(), data(), data()).check()


def test_evaluate_scores_logits_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9)).train()
    x, y = data()
    task = Task(model, (x, y), (x, y), (x, y), metric=balanced_accuracy)
    evaluation = task.evaluate(model, task.val)
    with torch.no_grad():
        expected = model[0](x).numpy()
    np.testing.assert_allclose(evaluation.outputs, expected, rtol=1e-5)
    assert (evaluation.outputs.dtype, evaluation.targets.dtype) == (np.float32, np.int64)
    right = expected.argmax(1) == y.numpy()
    assert evaluation.score == pytest.approx((right[::2].mean() + right[1::2].mean()) / 2)
    assert model.training and model[1].training


def test_predict_leaves_no_gradient_and_takes_16_bit_logits() -> None:
    model = nn.Linear(3, 2).bfloat16()
    x, y = data()
    outputs, _ = predict(model, TensorSplit(x.bfloat16(), y))
    assert outputs.dtype == np.float32
    assert model.weight.grad is None


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[1][0].eval()  # a frozen BatchNorm in a model that trains
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == before


def test_on_another_device_is_a_copy_in_eval_mode() -> None:
    model = nn.Linear(3, 2).train()
    task = Task(model, data(), data(), data(), name="mine", architecture="digits")
    moved = task.on("cpu")
    assert moved.model is not model and torch.equal(moved.model.weight, model.weight)
    assert model.training and not moved.model.training
    assert (moved.name, moved.architecture, moved.train) == ("mine", "digits", task.train)
    on_meta = task.on("meta")
    assert device_of(on_meta.model).type == "meta" and device_of(model).type == "cpu"


def test_device_of_a_model_without_parameters() -> None:
    assert device_of(nn.ReLU()).type == "cpu"
    with_buffer = nn.BatchNorm1d(2, affine=False).to("meta")
    assert device_of(with_buffer).type == "meta"


def test_example_input_is_one_validation_sample() -> None:
    val = (torch.full((5, 3), 7.0), torch.zeros(5, dtype=torch.long))
    example = Task(nn.Linear(3, 2), data(), val, data()).example_input
    assert example.tolist() == [[7.0, 7.0, 7.0]]
    assert example.untyped_storage().nbytes() == example.nbytes  # the rest of the batch is not kept with it


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


class Diverged(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


GOOD = (torch.zeros(6, 3), torch.arange(6) % 2)


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        (nn.Linear(3, 2), {"test": (torch.zeros(6, 4), GOOD[1])}, r"test= serves inputs of shape \(4,\), val= of"),
        (nn.Linear(3, 2), {"train": (GOOD[0].byte(), GOOD[1])}, "train= serves inputs of type torch.uint8"),
        (
            nn.Linear(3, 2),
            {"test": (GOOD[0], torch.zeros(6, 2).long())},
            r"targets of shape \(6, 2\)",
        ),
        (nn.Linear(3, 2), {"val": (GOOD[0], torch.zeros(6))}, "val= serves targets of .* torch.float32"),
        (nn.Linear(3, 2), {"val": DataLoader(TensorDataset(*GOOD), shuffle=True)}, "val= is shuffled"),
        (
            nn.Linear(3, 2),
            {"test": DataLoader(TensorDataset(*GOOD), batch_size=4, drop_last=True)},
            "test= leaves out its last samples; make its DataLoader with drop_last=False",
        ),
        (
            nn.Linear(3, 2),
            {"train": DataLoader(TensorDataset(*GOOD), batch_size=9, drop_last=True)},
            "train= serves no batch; it needs samples",
        ),
        (
            nn.Linear(3, 2),
            {"val": DataLoader(TensorDataset(*GOOD, GOOD[1]))},
            "val= serves 3 values a batch; .* weights .* WeightedRandomSampler of train=",
        ),
        (nn.Linear(3, 2), {"val": DataLoader([{"x": 1.0}])}, r"val= serves a dict a batch; .* pair of tensors"),
        (nn.Linear(3, 2), {"val": DataLoader(Endless())}, "val= is a DataLoader of a data set without a length"),
        (
            nn.Linear(3, 2),
            {"val": (GOOD[0].double(), GOOD[1])},
            r"float64; convert them to float32 \(x.float\(\)\)$",
        ),
        (
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            {"train": DataLoader(TensorDataset(*GOOD), batch_size=1)},
            "train= serves batches of one sample, .* more than 1 value per channel .* a larger batch_size$",
        ),
        (
            nn.Linear(3, 2),
            {"val": (GOOD[0].long(), GOOD[1])},
            r"int64; convert .* tokens, .* makes x.long\(\) again$",
        ),
        (
            nn.Linear(3, 2),
            {"val": DataLoader(TensorDataset(GOOD[0], GOOD[1].int()))},
            "val= serves targets of shape .* and type torch.int32; .* type torch.long",
        ),
        (
            nn.Linear(3, 2),
            {"val": (GOOD[0].numpy(), np.array(list("ababab")))},
            "val= has an array of type <U1; inputs and targets are numbers, classes from 0",
        ),
        (nn.Linear(3, 2).requires_grad_(False), {}, "no parameter of the model requires a gradient, and recovery"),
        (Pair(), {}, r"the model returns tuple; it must return a tensor of logits .*: wrap it in a module"),
        (Diverged(), {}, "the model's outputs on the first val samples are not all finite numbers"),
        (
            nn.Linear(4, 2),
            {},
            r"the model does not take the data: on inputs of shape \(3,\) it raised RuntimeError",
        ),
        (nn.Linear(3, 1), {}, "train= has a sample of class 1, and the model gives 1 logits: classes 0 to 0"),
        (nn.Linear(3, 2), {"val": (GOOD[0], GOOD[1] - 1)}, "val= has a sample of class -1"),
        (
            nn.Linear(3, 2),
            {"test": (GOOD[0] / 0, GOOD[1])},
            "test= has inputs that are NaN or infinite, in 6 samples",
        ),
        (nn.Linear(3, 2), {"val": (GOOD[0], torch.rand(6, 2))}, "val= serves labels other than 0 and 1"),
        (
            nn.Linear(3, 2),
            {"val": (GOOD[0], torch.zeros(6, 3))},
            "val= has 3 labels a sample and the model gives 2",
        ),
        (nn.Linear(3, 2), {"val": (GOOD[0], torch.zeros(6, 2))}, "must all have class numbers"),
        (nn.Flatten(0), {}, r"the model returns \(6,\)"),
        (
            nn.Linear(3, 3),
            {"val": (GOOD[0], torch.arange(6) % 3)},
            r"train= has no sample of class 2, which is judged: the network would forget it; add samples",
        ),
        (
            nn.Linear(3, 2),
            {part: (GOOD[0], torch.ones(6).long()) for part in ("train", "val", "test")},
            "train= has samples of class 1 alone; there must be two to tell apart",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_the_search(
    model: nn.Module, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Task(model, **{"train": GOOD, "val": GOOD, "test": GOOD, **changed}).check()


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, torch.bool])
def test_numbers_of_classes_may_be_of_any_whole_type(kind: torch.dtype) -> None:
    task = Task(nn.Linear(3, 2), *[(GOOD[0], GOOD[1].to(kind))] * 3)
    task.check()
    x, y = next(task.train.batches())
    assert torch.equal(y, GOOD[1]) and task.loss(task.model(x), y) > 0


@pytest.mark.parametrize("given", ["digits", lambda: 3])
def test_what_is_no_task_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="it must be a Task, or a function that makes one"):
        as_task(given)  # type: ignore[arg-type]


def absences(task: Task) -> tuple[str, ...]:
    """The notes but those on the samples that parts have in common, as they do here."""
    return tuple(note for note in task.notes if "held out" not in note)


def test_a_class_that_cannot_be_judged_is_noted() -> None:
    three, labels = (GOOD[0], torch.arange(6) % 3), (GOOD[0], torch.eye(3).repeat(2, 1))
    task = Task(nn.Linear(3, 3), three, GOOD, three, classes=("a", "b", "c"), notes=["of somebody"])
    task.check()
    assert absences(task) == (
        "of somebody",
        "val has no sample of class 2 (c): the search sees nothing of what is lost there",
    )
    task = Task(nn.Linear(3, 3), labels, labels, (GOOD[0], labels[1] * torch.tensor([0.0, 1.0, 0.0])))
    assert absences(task) == ("test has no sample of class 0, 2: the verdict says nothing of what is lost there",)
    seven = (torch.zeros(8, 3), torch.arange(8))
    (note,) = absences(Task(nn.Linear(3, 8), seven, (seven[0][:2], seven[1][:2]), seven))
    assert note.startswith("val has no sample of class 2, 3, 4, 5, 6 and 1 more: ")
    loader = DataLoader(TensorDataset(*GOOD), batch_size=2)
    assert absences(Task(nn.Linear(3, 3), three, loader, three)) == ()  # it would have to be read


def test_numpy_arrays_and_columns_of_labels_are_taken() -> None:
    arrays = (np.zeros((6, 3), dtype=np.float32), np.arange(6).reshape(6, 1) % 2)
    task = Task(nn.Linear(3, 2), arrays, list(arrays), arrays)
    task.check()
    assert next(task.val.batches())[1].shape == (6,)


def test_the_fingerprint_is_that_of_weights_and_data() -> None:
    model = nn.Linear(3, 2)
    same = Task(model, GOOD, GOOD, GOOD).fingerprint()
    assert Task(model, GOOD, GOOD, GOOD, name="other").fingerprint() == same
    assert Task(nn.Linear(3, 2), GOOD, GOOD, GOOD).fingerprint() != same
    assert Task(model, GOOD, GOOD, (GOOD[0][:5], GOOD[1][:5])).fingerprint() != same
    assert Task(model, GOOD, GOOD, (GOOD[0], GOOD[1].flip(0))).fingerprint() != same
    assert Task(model, GOOD, (GOOD[0] + 1, GOOD[1]), GOOD).fingerprint() != same
    in_loaders = [DataLoader(TensorDataset(GOOD[0] + k, GOOD[1])) for k in (0, 1)]
    first, other = (Task(model, GOOD, one, GOOD).fingerprint() for one in in_loaders)
    assert first != other and first == Task(model, GOOD, in_loaders[0], GOOD).fingerprint()


def test_a_sample_may_have_several_labels() -> None:
    y = (torch.arange(18).view(6, 3) % 2).float()
    model = nn.Linear(3, 3)
    task = Task(model, (GOOD[0], y), (GOOD[0], y), (GOOD[0], y), classes=("a", "b", "c"))
    task.check()
    logits = torch.randn(6, 3)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, y)
    torch.testing.assert_close(task.loss(logits, y), expected)
    evaluation = task.evaluate(model, task.val)
    assert evaluation.targets.tolist() == y.tolist() and evaluation.targets.dtype == np.int64
    found = (evaluation.outputs > 0) == evaluation.targets
    assert evaluation.score == found.all(axis=1).mean()
    with pytest.raises(ValueError, match="2 names of classes and the model gives 3"):
        Task(model, (GOOD[0], y), (GOOD[0], y), (GOOD[0], y), classes=("a", "b")).check()


def test_a_metric_may_be_named_and_needs_numbers() -> None:
    assert Task(nn.Linear(3, 2), GOOD, GOOD, GOOD, metric="auc").metric.name == "auc"
    lost = nn.Linear(3, 2)
    nn.init.constant_(lost.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="not all finite"):
        Task(lost, GOOD, GOOD, GOOD, metric="auc").evaluate(lost, TensorSplit(*GOOD))


class Flipped(TensorDataset):
    """Augments, wherever it is used."""

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(i)
        return x + torch.rand(()), y


def varied() -> tuple[Tensor, Tensor]:
    return torch.arange(60.0).reshape(20, 3), torch.arange(20) % 2


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(*varied()), 20, sampler=SubsetRandomSampler(range(20))),
        DataLoader(TensorDataset(*varied()), 20, sampler=WeightedRandomSampler(torch.ones(20), 20)),
        DataLoader(TensorDataset(*varied()), batch_sampler=BatchSampler(RandomSampler(range(20)), 20, False)),
        DataLoader(Flipped(*varied()), 20),
    ],
    ids=["subset", "weighted", "batches", "augmented"],
)
def test_samples_that_differ_from_pass_to_pass_are_refused_but_for_training(loader: DataLoader[Any]) -> None:
    """Models are compared sample by sample: what pairs two of different samples proves nothing."""
    Task(nn.Linear(3, 2), loader, varied(), varied()).check()
    for name in ("val", "test"):
        parts = {"train": varied(), "val": varied(), "test": varied(), name: loader}
        with pytest.raises(ValueError, match=f"{name}= serves other samples at every pass, and models could not"):
            Task(nn.Linear(3, 2), **parts).check()


def test_a_pass_is_what_its_sampler_serves() -> None:
    """A budget in epochs counts these: neither batches of one sample, nor samples that are never drawn."""
    data = TensorDataset(*varied())
    half = LoaderSplit(DataLoader(data, 4, sampler=SubsetRandomSampler(range(10))))
    assert (half.n_samples, half.batch_size) == (10, 4)
    more = LoaderSplit(DataLoader(data, 4, sampler=WeightedRandomSampler(torch.ones(20), 50)))
    assert (more.n_samples, more.batch_size) == (50, 4)
    batches = LoaderSplit(DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, False)))
    assert (batches.n_samples, batches.batch_size) == (20, 8)
    own = LoaderSplit(DataLoader(data, batch_sampler=[[0, 1, 2], [3, 4, 5], [6]]))
    assert (own.n_samples, own.batch_size) == (20, 3)
    ready = LoaderSplit(DataLoader([(torch.zeros(5, 3), torch.zeros(5).long())] * 4, batch_size=None))
    assert (ready.n_samples, ready.batch_size) == (20, 5)


@pytest.mark.parametrize("random", [RandomSampler, lambda d, **g: WeightedRandomSampler(torch.ones(20), 20, **g)])
def test_a_generator_of_the_loader_or_its_sampler_follows_the_seed(random: Any) -> None:
    """As PyTorch's page on reproducibility has it; else a trial would depend on those before it."""
    data, generator = TensorDataset(*varied()), torch.Generator()
    split = LoaderSplit(DataLoader(data, 4, sampler=random(data, generator=generator), generator=generator))
    first, second = ([x for x, _ in split.batches(torch.Generator().manual_seed(1))] for _ in "ab")
    assert all(map(torch.equal, first, second))
    other = [x for x, _ in split.batches(torch.Generator().manual_seed(2))]
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            nn.CrossEntropyLoss(reduction="none"),
            r"returned a tensor of shape \(2,\); it must return a scalar tensor",
        ),
        (
            nn.CrossEntropyLoss(weight=torch.ones(5)),
            r"logits of shape \(2, 2\) and targets of shape \(2,\), and rais",
        ),
        (lambda logits, y: logits.sum().item(), "returned float; it must return a scalar tensor"),
        (lambda logits, y: (logits.argmax(1) != y).float().mean(), "returned a number without a gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_said_before_the_first_trial(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Task(nn.Linear(3, 2), GOOD, GOOD, GOOD, loss=loss).check()
    assert str(caught.value).startswith("loss= gets logits") and "\n" not in str(caught.value)


def test_the_weights_of_classes_in_a_loss_go_where_the_model_goes() -> None:
    task = Task(nn.Linear(3, 2), GOOD, GOOD, GOOD, loss=nn.CrossEntropyLoss(weight=torch.ones(2)))
    moved = task.on("meta")
    assert moved.loss.weight.device.type == "meta" and task.loss.weight.device.type == "cpu"  # type: ignore[attr-defined]
