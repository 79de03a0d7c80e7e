"""Models: architectures by name, adapted to the data's channels and classes, and the cache of trained ones."""

import difflib
import hashlib
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from autocompress.formats import weights
from autocompress.gauges.macs import count_macs
from autocompress.learning.training import fit, threads_for
from autocompress.splits import Split
from autocompress.task import Loss


class SmallResNet(nn.Module):
    """A residual network for small images: a stem and three basic blocks of 16, 32 and 64 channels.

    The design of He et al., "Deep Residual Learning" (CVPR 2016), section 4.2, with one block per stage.

    Args:
        in_channels: Channels of the images.
        classes: Number of classes.
    """

    def __init__(self, in_channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(_block(16, 16, 1), _block(16, 32, 2), _block(32, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape ``(n, classes)`` for images of shape ``(n, in_channels, height, width)``."""
        logits: Tensor = self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))
        return logits


def _block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"digits": SmallResNet}
MOST = 100_000  # classes, or channels, that a description may ask for
_AUXILIARY = ("googlenet", "inception_v3")  # their auxiliary heads make the output in training a tuple


def build(description: str | Mapping[str, Any]) -> nn.Module:
    """An untrained network from the description of the dense architecture that a compressed model is stored with.

    Args:
        description: A name of `ARCHITECTURES`, or ``{"model": name, "classes": n, "in_channels": c}`` where the
            name is ``small_resnet``, one of torchvision's classifiers, or one of timm's.

    Raises:
        ValueError: If it is no description, or its name is unknown.
    """
    if isinstance(description, str):
        if description not in ARCHITECTURES:
            raise ValueError(f"{description!r} is no known architecture (known: {', '.join(ARCHITECTURES)})")
        return ARCHITECTURES[description]()
    try:
        name, classes, channels = (description[key] for key in ("model", "classes", "in_channels"))
    except (KeyError, TypeError):
        raise ValueError(
            f"{description!r} does not describe an architecture: model, classes, in_channels"
        ) from None
    if not isinstance(name, str) or not all(type(n) is int and 1 <= n <= MOST for n in (classes, channels)):
        raise ValueError(f"{description!r} does not describe an architecture: the numbers go from 1 to {MOST:,}")
    return make_named(name, classes, channels)


def make_named(name: str, classes: int, in_channels: int) -> nn.Module:
    """The untrained network of a name, with this number of classes and input channels.

    Raises:
        ValueError: If the name is unknown; the message suggests close matches.
    """
    name = known_name(name)
    if name == "small_resnet":
        return SmallResNet(in_channels, classes)
    if name.startswith("timm/"):
        network: nn.Module = _create_timm(name.removeprefix("timm/"), classes, in_channels)
        return network
    auxiliary = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **auxiliary)
    return with_first_conv(model, in_channels)


def known_name(name: str) -> str:
    """The name of a network that `make_named` makes; of timm's with ``timm/`` before it.

    Raises:
        ValueError: If the name is unknown; the message suggests close matches.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name == "small_resnet" or name.startswith("timm/") or name in known:
        return name
    if _is_timm(name):
        return f"timm/{name}"
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"unknown model {name!r}{hint} (small_resnet, a classifier of torchvision, timm/NAME, "
        "file.py:factory or package.module:factory)"
    )


def _is_timm(name: str) -> bool:
    """Whether timm is installed and knows the name."""
    return importlib.util.find_spec("timm") is not None and bool(importlib.import_module("timm").is_model(name))


def _create_timm(name: str, classes: int, in_channels: int) -> Any:
    if not re.fullmatch(r"[\w.]+", name):  # timm also accepts URLs and folders, which must not be loaded here
        raise ValueError(f"{name!r} is no name of a model of timm")
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        hint = "pip install 'autocompress[timm]', or name another model"
        raise ValueError(f"timm is not installed; {hint}") from None
    try:
        return timm.create_model(name, num_classes=classes, in_chans=in_channels)
    except RuntimeError as error:
        raise ValueError(f"timm cannot make {name!r}: {str(error).partition(chr(10))[0]}") from None


def first_conv(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The first 2-D convolution of a model, which takes the image, with its name."""
    return next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)


def with_first_conv(model: nn.Module, in_channels: int) -> nn.Module:
    """The model, its first convolution replaced by an untrained one if it takes another number of channels.

    Raises:
        ValueError: If that convolution is grouped.
    """
    first = first_conv(model)
    if first is None or first[1].in_channels == in_channels:
        return model
    name, conv = first
    if conv.groups != 1:
        raise ValueError(
            f"the first convolution {name} has {conv.groups} groups and cannot take {in_channels} channels"
        )
    window: tuple[Any, Any, Any, Any] = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    new_conv = nn.Conv2d(
        in_channels, conv.out_channels, *window, bias=conv.bias is not None, padding_mode=conv.padding_mode
    )
    model.set_submodule(name, new_conv)
    return model


def classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """The last linear layer or convolution of a model, which computes the logits, with its name."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return layers[-1] if layers else None


def with_classes(model: nn.Module, classes: int) -> nn.Module:
    """The model, its classifier replaced by an untrained one if it gives another number of logits.

    Raises:
        ValueError: If the model's last layer cannot be replaced.
    """
    last = classifier(model)
    if last is None:
        raise ValueError("the model has no linear layer or convolution that could be made to give the logits")
    name, layer = last
    if isinstance(layer, nn.Linear):
        if layer.out_features != classes:
            model.set_submodule(name, nn.Linear(layer.in_features, classes, bias=layer.bias is not None))
    elif layer.out_channels != classes:
        if layer.kernel_size != (1, 1):
            raise ValueError(
                f"the last layer {name} is no classifier; make the model give {classes} logits yourself"
            )
        model.set_submodule(name, nn.Conv2d(layer.in_channels, classes, 1, bias=layer.bias is not None))
    return model


def trained(
    architecture: str, train: Split, loss: Loss, *, epochs: float, lr: float, seed: int, cache: Path | None
) -> nn.Module:
    """The dense model of an architecture, trained on ``train`` or loaded from the cache, in eval mode.

    The cache's key is a hash of all that determines the training, including the data and torch's version.

    Args:
        architecture: A name of `ARCHITECTURES`.
        train: The training data.
        loss: Maps logits and targets to a scalar.
        epochs: Passes over the training data.
        lr: Peak learning rate.
        seed: Seeds the initial weights and the training.
        cache: Folder of the trained weights; None to train at every call.
    """
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]()
    recipe = {
        "architecture": architecture,
        "epochs": epochs,
        "lr": lr,
        "seed": seed,
        "torch": torch.__version__,
    }

    def train_it() -> None:
        x, _ = next(train.batches())
        with threads_for(count_macs(model, x[:1]) * train.batch_size):
            fit(model, train, loss, epochs=epochs, lr=lr, seed=seed)

    return cached(model, train_it, _cache_file(cache, architecture, _digest(recipe, train)))


def cached(model: nn.Module, train: Callable[[], None], file: Path | None) -> nn.Module:
    """The model in eval mode with the weights in ``file``; if that does not exist, trained and saved there."""
    if file and file.is_file():
        model.load_state_dict(weights.load(file))
        return model.eval()
    train()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        weights.save(model.state_dict(), file)
    return model.eval()


def _cache_file(cache: Path | None, name: str, digest: str) -> Path | None:
    return cache / f"{name}-{digest}.safetensors" if cache else None


def _digest(recipe: dict[str, object], train: Split) -> str:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for x, y in train.batches():
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    return digest.hexdigest()[:16]
