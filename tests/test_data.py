import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import autocompress.models
from autocompress.data import digits
from autocompress.gauges.macs import count_params
from autocompress.models import ARCHITECTURES, SmallResNet, trained
from autocompress.splits import TensorSplit
from autocompress.task import Task


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "cache"


@pytest.fixture(scope="module")
def task(cache: Path) -> Task:
    """Trained once for all the tests here; fills the cache."""
    return digits(cache)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network is trained again")

    monkeypatch.setattr(autocompress.models, "fit", refuse)


def parts(task: Task) -> tuple[TensorSplit, TensorSplit, TensorSplit]:
    return task.train, task.val, task.test


def test_digits_are_split_in_half_and_quarters(task: Task) -> None:
    assert [part.n_samples for part in parts(task)] == [898, 449, 450]
    for part in parts(task):
        assert part.x.shape[1:] == (1, 8, 8)
        assert (part.x.dtype, part.y.dtype) == (torch.float32, torch.int64)
        assert (float(part.x.min()), float(part.x.max())) == (0.0, 1.0)


def test_every_part_has_its_share_of_every_digit(task: Task) -> None:
    everything = np.bincount(load_digits().target, minlength=10)
    for part, share in zip(parts(task), (0.5, 0.25, 0.25), strict=True):
        counts = np.bincount(part.y.numpy(), minlength=10)
        assert (abs(counts - share * everything) <= 1).all()


def test_no_image_is_in_two_parts_and_none_is_lost(task: Task) -> None:
    rows = torch.cat([part.x.flatten(1) for part in parts(task)])
    labels = torch.cat([part.y for part in parts(task)])
    served = sorted(zip((rows * 16).round().int().tolist(), labels.tolist(), strict=True))
    images, targets = load_digits(return_X_y=True)
    assert served == sorted(zip(images.astype(int).tolist(), targets.tolist(), strict=True))
    seen = [{tuple(row) for row in part.x.flatten(1).tolist()} for part in parts(task)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_the_dense_network_is_worth_compressing(task: Task) -> None:
    assert isinstance(task.model, SmallResNet)
    assert not task.model.training
    assert count_params(task.model) > 70_000
    assert task.evaluate(task.model, task.val).score >= 0.97
    assert (task.name, task.architecture) == ("digits", "digits")
    assert ARCHITECTURES["digits"] is SmallResNet


@pytest.mark.usefixtures("no_training")
def test_the_cached_network_is_used_again(task: Task, cache: Path) -> None:
    again = digits(str(cache))
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert [f.suffix for f in cache.iterdir()] == [".safetensors"]
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts(task), parts(again), strict=True))


@pytest.mark.usefixtures("no_training", "task")
def test_a_damaged_cache_is_a_one_line_error_that_names_the_file(cache: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cache"
    shutil.copytree(cache, damaged)
    (file,) = damaged.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a readable weights file") as refused:
        digits(damaged)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_goes_into_the_training_makes_the_key(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    split = TensorSplit(torch.rand(20, 1, 8, 8, generator=generator), torch.arange(20) % 10, 10)
    other = TensorSplit(split.x, split.y.flip(0), 10)

    def train(split: TensorSplit, **changes: float) -> dict[str, torch.Tensor]:
        recipe = {"epochs": 1, "lr": 0.1, "seed": 0} | changes
        return trained("digits", split, F.cross_entropy, cache=tmp_path, **recipe).state_dict()

    first = train(split)
    for n, (data, changes) in enumerate(
        [(split, {"seed": 1}), (split, {"lr": 0.2}), (split, {"epochs": 2}), (other, {})]
    ):
        assert any(not torch.equal(tensor, first[name]) for name, tensor in train(data, **changes).items())
        assert len(list(tmp_path.iterdir())) == n + 2
    assert all(torch.equal(tensor, first[name]) for name, tensor in train(split).items())
    assert len(list(tmp_path.iterdir())) == 5


def test_training_is_deterministic_and_needs_no_cache(tmp_path: Path) -> None:
    split = TensorSplit(torch.rand(20, 1, 8, 8), torch.arange(20) % 10, 10)
    runs = [
        trained("digits", split, F.cross_entropy, epochs=1, lr=0.1, seed=3, cache=cache)
        for cache in (None, tmp_path)
    ]
    assert not any(model.training for model in runs)
    for name, tensor in runs[0].state_dict().items():
        assert torch.equal(tensor, runs[1].state_dict()[name]), name
