import copy

import pytest
import torch
from torch import Tensor, nn

from autocompress.networks.deployed import deployed, is_channels_last


def lived_in(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics that are not the first ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 2)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model.eval()


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class Written(nn.Module):
    """A convolution and a BatchNorm, used as a function says."""

    def __init__(self, use) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


IMAGE, ROW = torch.randn(2, 3, 8, 8), torch.randn(2, 6)
FOLDED = {
    "conv": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()), IMAGE),
    "with bias": (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)), IMAGE),
    "grouped": (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE),
    "linear": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), ROW),
    "conv, not affine": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "linear, not affine": (nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False)), ROW),
    "looks at the shape": (Written(lambda m, x: m.bn(y := m.conv(x)).view(y.shape[0], y.size(1), -1)), IMAGE),
    "looks at the type": (
        Written(lambda m, x: m.bn(m.conv(x.to(w.dtype) if (w := m.conv.weight).is_floating_point() else x))),
        IMAGE,
    ),
    "in place behind it": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGE),
}
KEPT = {
    "grouped transposed": (nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), IMAGE),
    "before the layer": (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), IMAGE),
    "with something between": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), IMAGE),
    "over positions": (
        nn.Sequential(nn.Unflatten(1, (5, 6)), nn.Linear(6, 5), nn.BatchNorm1d(5)),
        torch.randn(2, 30),
    ),
    "no statistics": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE),
    "read twice": (Written(lambda m, x: m.bn(y := m.conv(x)) + y), IMAGE),
    "read in place": (Written(lambda m, x: m.bn(m.conv(x).relu_())), IMAGE),
    "returned as well": (Written(lambda m, x: [(y := m.conv(x)), m.bn(y)]), IMAGE),
    "used twice": (Written(lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(-x))), IMAGE),
    "its weight is read": (Written(lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum()), IMAGE),
    "reached into": (Written(lambda m, x: m.bn(m.conv(x)) * float(m.bn.eps)), IMAGE),
}


@pytest.mark.parametrize("name", FOLDED)
def test_batchnorm_behind_a_layer_is_folded_into_it(name: str) -> None:
    model, x = FOLDED[name]
    dense = lived_in(copy.deepcopy(model))
    before = copy.deepcopy(dense.state_dict())
    folded = deployed(dense, x)
    assert batchnorms(folded) == 0
    assert not folded.training
    assert torch.allclose(folded(x), dense(x), atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    assert deployed(folded, x) is folded


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_folded_stays(name: str) -> None:
    model, x = KEPT[name]
    dense = lived_in(copy.deepcopy(model))
    same = deployed(dense, x)
    assert batchnorms(same) == 1
    found, expected = same(x), dense(x)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_model_in_training_mode_is_folded_with_its_statistics_and_left_in_its_mode() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    expected = model(IMAGE)
    model.train()
    folded = deployed(model, IMAGE)
    assert model.training and not folded.training
    assert torch.allclose(folded(IMAGE), expected, atol=1e-5)


def test_in_16_bits_the_product_is_rounded_once() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    folded = deployed(model, IMAGE.bfloat16())
    assert batchnorms(folded) == 0
    conv, bn = copy.deepcopy(model[0]).float(), copy.deepcopy(model[1]).float()
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    assert torch.equal(folded[0].weight, (conv.weight * factor[:, None, None, None]).bfloat16())


def test_convolutions_are_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert not is_channels_last(model)
    assert is_channels_last(deployed(model, IMAGE))
    assert not is_channels_last(model)
