"""Tasks made from options: any model with any data, on small data made on the fly."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import autocompress as ac
from autocompress.certify import certify
from autocompress.goal import as_objective
from autocompress.lc import LearningCompression
from autocompress.metrics import accuracy
from autocompress.models import SmallResNet, build, classifier, first_conv
from autocompress.networks.dense import ClassLoss, DenseTraining, balancing_weights, frozen_modules
from autocompress.networks.own_model import cached_weights, make_model, parse_arguments, read_weights
from autocompress.reading.images import FileImages, HeldImages, Sampling
from autocompress.reading.transforms import Preprocessing, augment, parse_augmentations
from autocompress.schemes import StructPrune
from autocompress.splits import TensorSplit
from autocompress.trial import Bound, TrialSpec, run_trial

RNG = np.random.default_rng(0)


@pytest.fixture
def npz(striped_file: Callable[..., str]) -> str:
    return striped_file(**{part: np.arange(n) % 2 for part, n in (("train", 64), ("val", 32), ("test", 32))})


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "import autocompress as ac\n"
        "def net(width=4, classes=7, channels=1):\n"
        "    pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "    return nn.Sequential(nn.Conv2d(channels, width, 3), *pool, nn.Linear(width, classes))\n"
        "def fails():\n    raise RuntimeError('no weights\\nhere')\n"
        "def text():\n    return 'a net'\n"
        "x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 3\n"
        "def pairs(n=12):\n    return (x[:n], y[:n]), (x, y), (x, y)\n"
        "def sets():\n    data = torch.utils.data.TensorDataset(x, y)\n"
        "    return {'train': data, 'val': data, 'test': data}\n"
        "def whole():\n    return ac.Task(net(classes=3), (x, y), (x, y), (x, y), name='whole')\n"
        "def two():\n    return 1, 2\n"
    )
    return str(tmp_path / "mine.py")


# The whole way


def test_an_npz_and_the_default_network_are_a_trained_task(npz: str, tmp_path: Path) -> None:
    told: list[str] = []
    options = {"data": npz, "train_epochs": 3, "train_lr": 0.01, "metric": "auc", "batch_size": 16}
    task = ac.make_task(**options, out=tmp_path, progress=told.append)
    assert isinstance(task.model, SmallResNet) and not task.model.training
    assert (task.name, task.metric.name, task.classes) == ("stripes", "auc", ("0", "1"))
    assert task.evaluate(task.model, task.val).score > 0.9
    assert [line for line in told if "epoch 1 of at most 3, loss" in line and "auc on val" in line]
    assert "grey images resized to 10 x 10 pixels" in task.preprocessing and "divided by 255" in task.preprocessing
    assert task.input["scale"] == 1 / 255 and len(task.input["mean"]) == 1
    again = ac.make_task(**options, out=tmp_path, progress=told.append)
    assert again.fingerprint() == task.fingerprint()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert sum("epoch 1" in line for line in told) == 1, "it was trained again"
    ac.make_task(**{**options, "label_smoothing": 0.1, "train_epochs": 1}, out=tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_normalised_by_the_data_means_mean_0_and_deviation_1(npz: str) -> None:
    task = ac.make_task(data=npz, train_epochs=0, normalize="data")
    assert isinstance(task.train, TensorSplit)
    assert float(task.train.x.mean()) == pytest.approx(0, abs=1e-4)
    assert float(task.train.x.std()) == pytest.approx(1, abs=1e-3)
    plain = ac.make_task(data=npz, train_epochs=0, normalize="none").train.x
    assert (float(plain.min()), float(plain.max())) == (0.0, pytest.approx(239 / 255))


@pytest.mark.parametrize(
    ("kind", "fits"), [("uint8", True), ("uint16", True), ("int64", False), ("float32", False)]
)
def test_imagenet_s_mean_is_for_images_of_0_to_1(stripes, tmp_path: Path, kind: str, fits: bool) -> None:
    y = np.arange(32) % 2
    made = {}
    for part in ("train", "val", "test"):
        made |= {f"{part}_images": stripes(y).astype(kind), f"{part}_labels": y}
    np.savez(tmp_path / "data.npz", **made)
    options = {"data": str(tmp_path / "data.npz"), "channels": 3, "normalize": "imagenet", "train_epochs": 0}
    if fits:
        assert ac.make_task(**options).train.x.abs().max() < 3
        return
    with pytest.raises(
        ValueError, match="is for images of 0 to 1, and these go from 0 to 239; save them as uint8"
    ):
        ac.make_task(**options)


@pytest.mark.parametrize("metric", ["accuracy", "auc", "balanced_accuracy"])
def test_a_class_that_val_or_test_lack_is_noted_as_for_a_task_of_tensors(striped_file, metric: str) -> None:
    data = striped_file(
        **{part: np.arange(32) % classes for part, classes in (("train", 4), ("val", 3), ("test", 2))}
    )
    task = ac.make_task(data=data, train_epochs=1, metric=metric)
    noted = [note for note in task.notes if "has no sample of class" in note]
    parts = (task.train, task.val, task.test)
    assert noted == [note for note in ac.Task(task.model, *parts).notes if "has no sample of class" in note]
    assert [note.partition(": ")[0] for note in noted] == [
        "val has no sample of class 3",
        "test has no sample of class 2, 3",
    ]
    assert 0 <= task.evaluate(task.model, task.test).score <= 1


def test_a_task_can_be_searched_saved_and_loaded_without_code(npz: str, tmp_path: Path) -> None:
    task = ac.make_task(data=npz, image_size="8", train_epochs=3, train_lr=0.01, batch_size=16)
    constraints = ["sensitivity>=0.1", "size<=1GB"]
    result = ac.tune(
        task, max_drop=0.5, trials=1, epochs=2, constraints=constraints, out=tmp_path / "runs", name="s"
    )
    assert [one.text for one, _ in result.constraints] == constraints
    stored = result.to_json()
    found_ill = np.array(stored["confusion"]["dense"])[1, 1] / stored["classes"][1]["support"]
    assert stored["constraints"][0]["dense"]["test"] == pytest.approx(found_ill)
    assert stored["constraints"][1]["dense"] is None
    assert stored["constraints"][0]["val"]["value"] >= 0.1
    assert len(stored["classes"]) == 2
    assert np.sum(stored["confusion"]["compressed"]) == 32
    loaded = ac.load(tmp_path / "runs" / "s" / "best")
    x = next(task.test.batches())[0]
    torch.testing.assert_close(loaded(x), result.model(x))
    readme = (tmp_path / "runs" / "s" / "best" / "README.md").read_text()
    assert "grey images resized to 8 x 8 pixels" in readme and "In order: 0, 1." in readme
    assert '"mean": [' in (tmp_path / "runs" / "s" / "best" / "plan.json").read_text()


def test_several_labels_are_learned_judged_and_compressed(stripes, tmp_path: Path) -> None:
    x = stripes(np.arange(96) % 2)
    y = RNG.integers(2, size=(96, 3))
    for k in range(3):
        x[y[:, k] == 1, 3 * k : 3 * k + 3] //= 4
    np.savez(tmp_path / "labels.npz", train_images=x, train_labels=y)
    task = ac.make_task(
        data=str(tmp_path / "labels.npz"), train_epochs=4, train_lr=0.01, batch_size=16, metric="auc",
        balance="weights", label_smoothing=0.05,
    )  # fmt: skip
    assert next(task.train.batches())[1].shape == (16, 3)
    assert task.evaluate(task.model, task.train).score > 0.6
    dense = task.evaluate(task.model, task.val)
    scheme, recovery = StructPrune(), LearningCompression(epochs=1)
    facts = scheme.analyze(task.model, task.example_input)
    spec = TrialSpec(1, 0.5, task, scheme, facts, recovery, (as_objective("density"),), Bound(0.9), dense, seed=0)
    trial = run_trial(spec)
    assert trial.model is not None and 0.1 < trial.density <= 0.5
    compressed = task.evaluate(trial.model, task.test)
    verdict = certify(task.metric, task.evaluate(task.model, task.test), compressed, 0.9)
    assert verdict.met and np.isfinite(verdict.upper)
    result = ac.tune(task, max_drop=0.9, trials=1, epochs=1, out=tmp_path / "runs", name="labels")
    assert result.model is not None and (result.folder / "report.html").is_file()
    readme = (result.folder / "best" / "README.md").read_text(encoding="utf-8")
    assert "the sigmoid of a logit is the label's probability" in readme and "softmax" not in readme


# Models


def test_a_name_of_torchvision_for_any_classes_and_channels(npz: str) -> None:
    task = ac.make_task(data=npz, model="squeezenet1_1", image_size="32x40", train_epochs=0, weights="none")
    assert task.architecture == {"model": "squeezenet1_1", "classes": 2, "in_channels": 1}
    rebuilt = build(task.architecture)
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in task.model.parameters()]
    assert first_conv(task.model)[1].in_channels == 1
    assert task.example_input.shape == (1, 1, 32, 40)


def test_trained_weights_from_a_file_are_taken_as_they_are(npz: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = SmallResNet(1, 2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "w.pt")
    told: list[str] = []
    task = ac.make_task(data=npz, model="small_resnet", weights=str(tmp_path / "w.pt"), progress=told.append)
    assert torch.equal(task.model.classifier.weight, trained.classifier.weight)
    assert not any("epoch" in line for line in told)
    assert f"weights: {tmp_path / 'w.pt'}" in task.notes


def test_weights_for_other_classes_keep_all_but_the_classifier(tmp_path: Path) -> None:
    trained = SmallResNet(3, 1000)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    made = make_model(
        "small_resnet", arguments={}, weights=str(tmp_path / "w.pt"), classes=4, data_channels=1, seed=1
    )
    assert not made.is_trained and made.channels == 3
    assert torch.equal(made.model.stem[0].weight, trained.stem[0].weight)
    assert made.model.classifier.out_features == 4
    assert any("gives 1000 logits; it is made anew" in note for note in made.notes)
    assert any("the images are grey and small_resnet takes RGB" in note for note in made.notes)


def test_torchvision_s_weights_are_used_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert cached_weights("squeezenet1_1") is None and cached_weights("small_resnet") is None
    offered = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    file = tmp_path / "checkpoints" / offered.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.manual_seed(3)
    theirs = torchvision.models.squeezenet1_1(weights=None)
    torch.save(theirs.state_dict(), file)
    made = make_model("squeezenet1_1", arguments={}, weights="auto", classes=2, data_channels=1)
    assert torch.equal(first_conv(made.model)[1].weight, theirs.features[0].weight)
    assert classifier(made.model)[1].out_channels == 2 and not made.is_trained


def test_a_factory_is_fitted_to_the_data(npz: str, code: str) -> None:
    task = ac.make_task(data=npz, model=f"{code}:net", model_args=("width=6", "classes=3"), train_epochs=0)
    assert (task.model[0].out_channels, task.model[4].out_features) == (6, 2)
    assert any("gave 3 logits and is made anew for 2 classes" in note for note in task.notes)
    assert task.architecture is None
    colour = ac.make_task(data=npz, model=f"{code}:net", model_args=("channels=3",), train_epochs=0)
    assert colour.example_input.shape == (1, 3, 10, 10)


def test_a_factory_in_a_package(npz: str) -> None:
    task = ac.make_task(data=npz, model="autocompress.models:SmallResNet", train_epochs=0)
    assert isinstance(task.model, SmallResNet) and task.model.classifier.out_features == 2


def test_a_model_of_timm(npz: str) -> None:
    pytest.importorskip("timm")
    named, bare = (ac.make_task(data=npz, model=name, train_epochs=0) for name in ("timm/resnet10t", "resnet10t"))
    assert named.example_input.shape[1] == 1 and named.model.conv1[0].in_channels == 1
    assert named.model.fc.out_features == 2
    assert bare.architecture == {"model": "resnet10t", "classes": 2, "in_channels": 1}
    assert build(bare.architecture).state_dict().keys() == named.model.state_dict().keys()
    with pytest.raises(ValueError, match="timm cannot make 'resnet10tt': Unknown model"):
        ac.make_task(data=npz, model="timm/resnet10tt")


def test_timm_that_is_not_installed(npz: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm is not installed; pip install"):
        ac.make_task(data=npz, model="timm/resnet18")
    with pytest.raises(ValueError, match="unknown model 'resnet10t'"):
        ac.make_task(data=npz, model="resnet10t")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet81"}, "unknown model 'resnet81'; did you mean"),
        ({"model": "MINE:absent"}, "has no 'absent'"),
        ({"model": "MINE"}, r"does not say which name of which file; write .*mine\.py:name$"),
        ({"data": "MINE"}, r"does not say which name of which file; write .*mine\.py:name$"),
        ({"model": "MINE:fails"}, "raised RuntimeError: no weights"),
        ({"model": "MINE:text"}, "gives a str; it must give a torch.nn.Module"),
        ({"model": "MINE:x"}, "is a Tensor, not a function"),
        ({"model": "MINE:net", "model_args": ("depth=3",)}, "cannot be called with the arguments"),
        ({"model": "MINE:net", "model_args": ("width",)}, "'width' is no argument; write key=value"),
        ({"model": "resnet18", "model_args": ("width=3",)}, "model arguments go to a factory"),
        (
            {"model": "no.such.module:net"},
            "'no' is neither installed nor in .*; go to its folder, or name a file",
        ),
        ({"weights": "absent.pt"}, "there is no weights file 'absent.pt'"),
        ({"image_size": "big"}, "--image-size 'big' is no size"),
        ({"split": "80/20"}, "--split 80/20: three positive shares"),
        ({"augment": ("spin",)}, "unknown augmentation 'spin' .available: none, skin"),
        ({"normalize": "imagenet"}, "--normalize imagenet is for 3 channels"),
        ({"metric": "acc"}, "unknown metric 'acc'"),
        (
            {"train_lr": 0.1, "patience": 3, "train_epochs": 0},
            "--train-lr, --patience cannot be used, for the model is",
        ),
        ({"data_args": ("a=1",)}, "--data-args go to a factory"),
        ({"freeze": ("head",), "train_epochs": 1}, "the model has no such module; at the top it has stem"),
        ({"constraints": ("sensitivity>0",)}, "is not a constraint"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(npz: str, code: str, options, message: str) -> None:
    named = {k: v.replace("MINE", code) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message) as refused:
        ac.make_task(**{"data": npz, "train_epochs": 0, **named})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "absent.py:net"}, "there is no file 'absent.py'"),
        ({"model": "MINE:absent"}, "has no 'absent'; it has"),
        ({"model": "MINE:net", "model_args": ("depth=3",)}, "cannot be called with the arguments"),
        ({"model": "resnet81"}, "unknown model 'resnet81'"),
        ({"weights": "absent.pt"}, "there is no weights file 'absent.pt'"),
    ],
)
@pytest.mark.parametrize("data", ["no-such.npz", "MINE:fails"])
def test_a_model_that_is_not_there_is_found_out_before_the_data_are_read(
    code: str, options, message: str, data: str
) -> None:
    named = {k: v.replace("MINE", code) if isinstance(v, str) else v for k, v in {**options, "data": data}.items()}
    with pytest.raises(ValueError, match=message):
        ac.make_task(**named)


def test_a_model_that_its_file_makes_is_seeded(npz: str, tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("from autocompress.models import SmallResNet\nnet = SmallResNet(1, 2)\n")
    seeds = [
        ac.make_task(data=npz, model=f"{tmp_path / 'made.py'}:net", train_epochs=0, task_seed=seed).fingerprint()
        for seed in (0, 0, 1)
    ]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_model_s_file_is_run_once(npz: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "from autocompress.models import SmallResNet\nprint('run')\ndef net(): return SmallResNet(1, 2)\n"
    (tmp_path / "loud.py").write_text(code)
    ac.make_task(data=npz, model=f"{tmp_path / 'loud.py'}:net", train_epochs=0)
    assert capsys.readouterr().out == "run\n"


def test_weights_that_are_pickled_objects_or_damaged_or_of_another_model(tmp_path: Path) -> None:
    torch.save(SmallResNet(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"loading it could run code\. If you trust it, convert it once"):
        read_weights(tmp_path / "model.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="is not a readable weights file"):
        read_weights(tmp_path / "damaged.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "tensor.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"do not fit the model: \d+ tensors are absent"):
        make_model("small_resnet", arguments={}, weights=str(tmp_path / "other.pt"), classes=2, data_channels=1)


def test_arguments_are_json_or_text() -> None:
    parsed = parse_arguments(["a=3", "b=0.5", "c=True", "d=text", "e=[1, 2]", "f=x=y", "g=None"])
    assert parsed == {"a": 3, "b": 0.5, "c": True, "d": "text", "e": [1, 2], "f": "x=y", "g": None}


# Data from a factory


@pytest.mark.parametrize("name", ["pairs", "sets"])
def test_a_factory_s_data(code: str, name: str) -> None:
    task = ac.make_task(data=f"{code}:{name}", train_epochs=1, batch_size=6)
    assert (task.train.n_samples, task.classes) == (12, ("0", "1", "2"))
    assert isinstance(task.model, SmallResNet)


def test_a_factory_s_task_keeps_its_own_model(code: str) -> None:
    task = ac.make_task(data=f"{code}:whole", metric="kappa")
    assert (task.name, task.metric.name) == ("whole", "kappa")
    with pytest.raises(ValueError, match=r"--model, --augment cannot be used, for .* gives a task"):
        ac.make_task(data=f"{code}:whole", model="resnet18", augment=("flip",))
    with pytest.raises(ValueError, match=r"--image-size cannot be used, for .* prepares its own data"):
        ac.make_task(data=f"{code}:pairs", image_size="8")
    with pytest.raises(ValueError, match="gives a tuple; it must give a Task"):
        ac.make_task(data=f"{code}:two")


# Augmentation, balance, freezing


def test_sets_of_augmentations_are_their_parts_in_one_order() -> None:
    assert parse_augmentations(["skin"]) == ("rotation", "flip", "crop", "jitter")
    assert parse_augmentations(["jitter", "flip", "flip"]) == ("flip", "jitter")
    assert "flip" not in parse_augmentations(["xray"])
    assert parse_augmentations(["none"]) == ()


@pytest.mark.parametrize("name", ["rotation", "flip", "vertical-flip", "crop", "jitter"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_is_a_function_of_the_seed(name: str, channels: int) -> None:
    image = torch.randint(256, (channels, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    changed = [augment(image, (name,), seed) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(augment(image, (name,), seed), changed[seed]) for seed in range(12))
    assert all((one.shape, one.dtype) == (image.shape, image.dtype) for one in changed)
    assert any(not torch.equal(one, image) for one in changed)


@pytest.fixture
def held(stripes) -> Callable[..., HeldImages]:
    def held(augmentations: tuple[str, ...] = ()) -> HeldImages:
        y = np.arange(40) % 2
        pixels = torch.from_numpy(stripes(y))[:, None]
        preprocessing = Preprocessing((10, 10), 1, 1 / 255)
        return HeldImages(pixels, torch.from_numpy(y), preprocessing, Sampling(8, augmentations, None))

    return held


def test_only_training_is_augmented(held) -> None:
    split = held(("flip", "crop"))
    plain = torch.cat([x for x, _ in split.batches()])
    torch.testing.assert_close(plain, split.pixels.float() / 255)
    drawn = [torch.cat([x for x, _ in split.batches(torch.Generator().manual_seed(4))]) for _ in range(2)]
    assert torch.equal(drawn[0], drawn[1])
    originals = {tuple(row) for row in plain.flatten(1).tolist()}
    assert any(tuple(row) not in originals for row in drawn[0].flatten(1).tolist())


def test_files_and_memory_serve_the_same_whatever_the_workers(stripes, tmp_path: Path) -> None:
    y = np.arange(20) % 2
    x = stripes(y)
    files = []
    for i, image in enumerate(x):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(files[-1])
    preprocessing = Preprocessing((10, 10), 1, 1 / 255, (0.5,), (0.2,))
    sampling = Sampling(8, ("rotation", "jitter"))
    memory = HeldImages(torch.from_numpy(x)[:, None], torch.from_numpy(y), preprocessing, sampling)
    for workers in (0, 2):
        served = Sampling(8, sampling.augmentations, None, workers)
        read = FileImages(files, memory.y, preprocessing, served)
        for generator in (lambda: None, lambda: torch.Generator().manual_seed(7)):
            pairs = list(zip(memory.batches(generator()), read.batches(generator()), strict=True))
            assert len(pairs) == (2 if generator() else 3)
            assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_on_another_device_images_arrive_as_bytes_and_stay_where_there_is_room(
    held, stripes, tmp_path: Path
) -> None:
    """The device ``meta`` holds no numbers, but knows what is where, as a GPU does."""
    meta, file = torch.device("meta"), tmp_path / "one.png"
    Image.fromarray(stripes(np.zeros(1, dtype=int))[0]).save(file)
    plain, augmented = held(), held(("flip",))
    room = plain.pixels.nbytes
    kept = plain.kept_on(meta, room)
    assert kept.pixels.is_meta and kept.y.is_meta
    assert not plain.kept_on(meta, room - 1).pixels.is_meta
    assert not augmented.kept_on(meta, room).pixels.is_meta  # image after image, which the CPU does faster
    preprocessing = Preprocessing((10, 10), 1, 1 / 255, (0.5,), (0.2,))
    files = FileImages([file], torch.zeros(1), preprocessing, Sampling(1)).kept_on(meta, 0)
    for split in (kept, plain.kept_on(meta, 0), augmented.kept_on(meta, room), files):
        x, _ = next(split.batches(torch.Generator()))
        assert x.is_meta and x.dtype == torch.float32


def test_a_sampler_draws_rare_classes_as_often() -> None:
    y = torch.tensor([0] * 360 + [1] * 40)
    weights = (1 / torch.bincount(y).double())[y]
    split = HeldImages(
        torch.zeros(400, 1, 2, 2, dtype=torch.uint8), y, Preprocessing((2, 2), 1, 1.0), Sampling(50, (), weights)
    )
    drawn = torch.cat([labels for _, labels in split.batches(torch.Generator().manual_seed(0))])
    assert 0.4 < float(drawn.float().mean()) < 0.6
    assert float(torch.cat([labels for _, labels in split.batches()]).sum()) == 40


def test_weights_make_each_class_count_the_same() -> None:
    y = torch.tensor([0] * 6 + [1] * 2)
    assert balancing_weights(y, 2) == pytest.approx((8 / 2 / 6, 8 / 2 / 2))
    assert balancing_weights(torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 1]]), 2) == pytest.approx((3, 3))
    logits = torch.zeros(8, 2).requires_grad_()
    ClassLoss(balancing_weights(y, 2))(logits, y).backward()
    assert logits.grad.sum(dim=0).abs().max() < 1e-6  # the classes pull alike


def test_the_loss_of_labels_is_smoothed_towards_a_half() -> None:
    logits, targets = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[0.95, 0.05]]))
    torch.testing.assert_close(ClassLoss((), 0.1)(logits, targets), expected)


def test_what_is_frozen_does_not_move(npz: str) -> None:
    options = {"data": npz, "train_lr": 0.01, "batch_size": 16}
    before = ac.make_task(data=npz, train_epochs=0).model.state_dict()
    task = ac.make_task(**options, train_epochs=2, freeze=("stem", "stages.0"))
    for name, tensor in task.model.state_dict().items():
        is_frozen = name.startswith(("stem.", "stages.0."))
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]) == is_frozen, name
    assert all(p.requires_grad for p in task.model.parameters())
    layers = frozen_modules(task.model, ["0.5"])
    assert layers[0] is task.model.stem[0] and task.model.classifier not in layers


def test_training_keeps_the_best_epoch_and_ends_when_nothing_improves(npz: str) -> None:
    told: list[str] = []
    task = ac.make_task(
        data=npz, train_epochs=40, patience=2, train_lr=0.01, batch_size=16, balance="sampler", augment=["jitter"],
        train_optimizer="sgd", progress=told.append,
    )  # fmt: skip
    scores = [float(line.split("on val ")[1][:6]) for line in told if "on val" in line]
    assert len(scores) < 40 and "no better for 2 epochs" in told[-1]
    assert task.evaluate(task.model, task.val).score == pytest.approx(max(scores), abs=1e-4)


def test_training_options_are_checked() -> None:
    for wrong, message in (({"optimizer": "adam"}, "adamw or sgd"), ({"epochs": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            DenseTraining(**wrong)
    with pytest.raises(ValueError, match="below 1"):
        ClassLoss((), 1.0)


def test_the_digits_with_another_metric_or_model() -> None:
    task = ac.make_task(metric="balanced_accuracy", constraints=("recall[8]>=0.5",))
    assert (task.name, task.metric.name, task.architecture) == ("digits", "balanced_accuracy", "digits")
    other = ac.make_task(data="digits", model="small_resnet", train_epochs=0, metric="log_loss")
    assert other.metric is not accuracy and other.train.n_samples == 898


def test_help_needs_no_torch() -> None:
    import subprocess

    code = "import sys, autocompress.task_options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
