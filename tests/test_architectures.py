"""Structured pruning on the architectures that people use, with random weights."""

import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from autocompress.scheme import Theta
from autocompress.schemes import StructPrune
from autocompress.testing import masked_model, telling, telling_error

CLASSES = 10
# Any width will do, so what is asked is met to a channel; all layers thin alike, so that signals come through.
SCHEME = StructPrune(criterion="l2", normalize="mean", align=1)
# Of what two images differ by: half of it is rounding in the deepest network, a channel that is another far more.
TOLERANCE = 3e-3


class PaddedResNet(nn.Module):
    """A residual network for 32x32 images, its shortcuts without parameters (He et al. 2016, option A)."""

    def __init__(self, blocks: int = 3, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]))
        pairs = [(widths[max(s - (b == 0), 0)], width) for s, width in enumerate(widths) for b in range(blocks)]
        self.blocks = nn.Sequential(*(PaddedBlock(before, after) for before, after in pairs))
        self.classifier = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x).relu()).mean((2, 3)))


class PaddedBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.pad = (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return (x + y).relu()


@dataclass(frozen=True)
class Architecture:
    """How to make a model, and the smallest image that it takes."""

    make: Callable[[], nn.Module]
    side: int
    full_side: int = 224


def zoo(name: str, side: int = 64, full_side: int = 224, **changes: object) -> Architecture:
    return Architecture(
        lambda: torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **changes), side, full_side
    )


ARCHITECTURES = {
    "cifar_resnet20": Architecture(PaddedResNet, 32, 32),
    "alexnet": zoo("alexnet"),
    "vgg11": zoo("vgg11", 32),
    "vgg11_bn": zoo("vgg11_bn", 32),
    "vgg16_bn": zoo("vgg16_bn", 32),
    "resnet18": zoo("resnet18"),
    "resnet50": zoo("resnet50"),
    "resnext50_32x4d": zoo("resnext50_32x4d"),
    "wide_resnet50_2": zoo("wide_resnet50_2"),
    "densenet121": zoo("densenet121"),
    "densenet169": zoo("densenet169"),
    "googlenet": zoo("googlenet", init_weights=False),
    "inception_v3": zoo("inception_v3", 75, 299, init_weights=False),
    "mobilenet_v2": zoo("mobilenet_v2"),
    "mobilenet_v3_small": zoo("mobilenet_v3_small"),
    "mobilenet_v3_large": zoo("mobilenet_v3_large"),
    "efficientnet_b0": zoo("efficientnet_b0"),
    "regnet_x_400mf": zoo("regnet_x_400mf"),
    "regnet_y_400mf": zoo("regnet_y_400mf"),
    "mnasnet1_0": zoo("mnasnet1_0"),
    "squeezenet1_0": zoo("squeezenet1_0"),
    "shufflenet_v2_x1_0": zoo("shufflenet_v2_x1_0"),
    "convnext_tiny": zoo("convnext_tiny"),
    "vit_b_16": zoo("vit_b_16", 224),
    "swin_t": zoo("swin_t"),
    "swin_v2_t": zoo("swin_v2_t", full_side=256),
    "maxvit_t": zoo("maxvit_t", 224),
}
QUICK = (
    *("cifar_resnet20", "squeezenet1_0", "shufflenet_v2_x1_0", "mobilenet_v3_small", "resnext50_32x4d"),
    *("regnet_y_400mf", "googlenet", "swin_t"),
)


def images(side: int) -> Tensor:
    """Two smooth ones: of noise at every pixel any two look alike to a network that averages."""
    return F.interpolate(torch.randn(2, 3, 4, 4), size=(side, side), mode="bicubic")


def alive(model: nn.Module, x: Tensor) -> nn.Module:
    """A model whose normalisation and constant parameters are not trivial, in eval mode.

    Fresh layers hide errors: BatchNorm with statistics 0 and 1, layer scales of 1e-6.
    """
    with torch.no_grad():
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if bool((p == p.flatten()[0]).all()):
                    p.copy_(torch.rand_like(p) + (0.5 if p.flatten()[0] else -0.5))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.9
        model.train()(x)
    return model.eval()


def tensors(outputs: object) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Pruned:
    """What came of a model at one density; the error is against what two images differ by."""

    asked: float
    density: float
    error: float
    realized: nn.Module
    theta: Theta


def prune(model: nn.Module, x: Tensor, facts: object, density: float) -> Pruned:
    """Prunes to a density, or as low as is possible, and compares with the masked model."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    lowest = SCHEME.lowest_density(facts)
    if density < lowest:
        with pytest.raises(ValueError, match=f"the lowest possible here is {lowest:.4g}"):
            SCHEME.pi(weights, density, facts)
    theta = SCHEME.pi(weights, max(density, lowest), facts)
    masked = telling(masked_model(SCHEME, model, theta), x)
    realized = SCHEME.realize(masked, theta, facts)
    with torch.no_grad():
        expected, outputs = masked(x), realized(x)
    assert outputs.shape == expected.shape == (len(x), CLASSES)
    kept = sum(p.numel() for p in realized.parameters())
    assert kept == theta.kept
    error = telling_error(outputs, expected)
    return Pruned(density, kept / sum(w.numel() for w in weights.values()), error, realized, theta)


def assert_usable(pruned: Pruned, model: nn.Module, x: Tensor, facts: object, export: bool = True) -> None:
    """It trains, copies, loads into a model realized anew, and exports."""
    realized = pruned.realized
    clone = copy.deepcopy(realized).train()
    clone.zero_grad()
    loss = sum(output.square().mean() for output in tensors(clone(x)))
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, p in clone.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    plan = json.loads(json.dumps(dict(pruned.theta.plan)))
    again = SCHEME.realize(model, Theta({}, {}, 0, plan), facts)
    again.load_state_dict(realized.state_dict())
    with torch.no_grad():
        expected = realized(x)
        assert torch.equal(again.eval()(x), expected)
        if export:
            exported = torch.export.export(realized, (x,)).module()(x)
            assert float((exported - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def examine(name: str, side: int, export: bool = True) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    x = images(side)
    model = alive(architecture.make(), x)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left whole has tests of its own
        began = time.process_time()  # what other processes take does not count
        facts = SCHEME.analyze(model, x[:1])
        assert time.process_time() - began < 30
    for density in (0.5, 0.1):
        pruned = prune(model, x, facts, density)
        assert pruned.density <= max(density, SCHEME.lowest_density(facts))
        assert pruned.error < TOLERANCE
        assert_usable(pruned, model, x, facts, export and density == 0.5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", QUICK)
def test_architecture(name: str) -> None:
    examine(name, ARCHITECTURES[name].side, export=name in ("cifar_resnet20", "shufflenet_v2_x1_0"))


@pytest.mark.parametrize("name", ("cifar_resnet20", "resnext50_32x4d"))
def test_the_comparison_tells_that_one_channel_is_another(name: str) -> None:
    torch.manual_seed(0)
    x = images(ARCHITECTURES[name].side)
    model = alive(ARCHITECTURES[name].make(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        realized = prune(model, x, SCHEME.analyze(model, x[:1]), 0.5).realized
    with torch.no_grad():
        right = realized(x)
        for layer in [m for m in realized.modules() if isinstance(m, nn.Conv2d)]:
            before = layer.weight.clone()
            layer.weight[:2] = before[[1, 0]]
            assert telling_error(realized(x), right) > 3 * TOLERANCE
            layer.weight.copy_(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_at_full_size(name: str) -> None:
    examine(name, ARCHITECTURES[name].full_side)
