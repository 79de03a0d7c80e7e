"""Models: the architectures that autocompress brings, and dense training with a cache."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from autocompress import weights
from autocompress.measurement import count_macs
from autocompress.task import Loss, Split
from autocompress.training import fit, threads_for


class SmallResNet(nn.Module):
    """A residual network for small images: a stem and three basic blocks of 16, 32 and 64 channels.

    The design of He et al., "Deep Residual Learning" (CVPR 2016), section 4.2, with one block a stage.

    Args:
        in_channels: Channels of the images.
        classes: How many classes there are.
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
        """Logits of shape ``(n, classes)`` of images of shape ``(n, in_channels, height, width)``."""
        logits: Tensor = self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))
        return logits


def _block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"digits": SmallResNet}


def trained(
    architecture: str, train: Split, loss: Loss, *, epochs: float, lr: float, seed: int, cache: Path | None
) -> nn.Module:
    """The dense model of that architecture, trained on ``train``, or taken from the cache.

    The cache's key is a hash of everything that goes into the training, data included.
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
    file = cache / f"{architecture}-{_digest(recipe, train)}.safetensors" if cache else None
    if file and file.is_file():
        model.load_state_dict(weights.load(file))
        return model.eval()
    x, _ = next(train.batches())
    with threads_for(count_macs(model, x[:1]) * train.batch_size):
        fit(model, train, loss, epochs=epochs, lr=lr, seed=seed)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        weights.save(model.state_dict(), file)
    return model


def _digest(recipe: dict[str, object], train: Split) -> str:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for x, y in train.batches():
        digest.update(x.numpy().tobytes())
        digest.update(y.numpy().tobytes())
    return digest.hexdigest()[:16]
