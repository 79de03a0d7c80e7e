"""Small architectures for the conformance suite, each with a structure that is easily compressed wrongly."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

CLASSES = 5
INPUT_SHAPE = (3, 8, 8)


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _head(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class _Added(nn.Module):
    """A residual connection: relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Concatenated(nn.Module):
    """A dense connection: x and relu(body(x)), concatenated along the channels."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.relu(self.body(x))], dim=1)


class _Gated(nn.Module):
    """Squeeze and excitation: x, each channel times a gate that depends on all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))


class _Patches(nn.Module):
    """An image as a sequence of embedded patches of 4x4 pixels, with their positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(torch.zeros(1, 4, width))

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.embed(x)
        return patches.flatten(2).transpose(1, 2) + self.positions


class _Block(nn.Module):
    """A block of a transformer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        attended: Tensor = x + self.attention(y, y, y, need_weights=False)[0]
        hidden: Tensor = self.mlp(attended)
        return attended + hidden


class _Mean(nn.Module):
    """The mean over a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def plain() -> nn.Module:
    """Convolutions, each with BatchNorm and ReLU, and a classifier."""
    return nn.Sequential(_conv_bn(3, 12), nn.ReLU(), _conv_bn(12, 16, stride=2), nn.ReLU(), _head(16))


def residual() -> nn.Module:
    """Residual blocks, with and without a convolution in the shortcut."""
    first = nn.Sequential(_conv_bn(8, 8), nn.ReLU(), _conv_bn(8, 8))
    second = nn.Sequential(_conv_bn(8, 16, stride=2), nn.ReLU(), _conv_bn(16, 16))
    return nn.Sequential(
        _conv_bn(3, 8), nn.ReLU(), _Added(first), _Added(second, _conv_bn(8, 16, 1, stride=2)), _head(16)
    )


def concatenated() -> nn.Module:
    """Layers that read the outputs of all layers before them, concatenated."""
    layers = (_Concatenated(_conv_bn(8, 6)), _Concatenated(_conv_bn(14, 6)), _conv_bn(20, 12, 1))
    return nn.Sequential(_conv_bn(3, 8), nn.ReLU(), *layers, nn.ReLU(), _head(12))


def depthwise() -> nn.Module:
    """Inverted residual blocks: expand, convolve each channel by itself, project, add."""

    def inverted(channels: int, expanded: int) -> nn.Module:
        filtered = _conv_bn(expanded, expanded, groups=expanded)
        return nn.Sequential(
            _conv_bn(channels, expanded, 1), nn.ReLU6(), filtered, nn.ReLU6(), _conv_bn(expanded, channels, 1)
        )

    return nn.Sequential(_conv_bn(3, 8), nn.ReLU6(), _Added(inverted(8, 20)), _Added(inverted(8, 24)), _head(8))


def flattened() -> nn.Module:
    """A linear layer that reads every position of every channel, and a second one that reads its neurons."""
    features = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(8 * 2 * 2, 24), nn.ReLU(), nn.Linear(24, CLASSES))


def gated() -> nn.Module:
    """Squeeze and excitation between convolutions."""
    return nn.Sequential(
        _conv_bn(3, 12), nn.ReLU(), _Gated(12, 4), _conv_bn(12, 16), nn.ReLU(), _Gated(16, 4), _head(16)
    )


def grouped() -> nn.Module:
    """A residual block whose middle convolution works in groups of channels."""
    body = (_conv_bn(12, 16, 1), nn.ReLU(), _conv_bn(16, 16, groups=4), nn.ReLU(), _conv_bn(16, 12, 1))
    return nn.Sequential(_conv_bn(3, 12), nn.ReLU(), _Added(nn.Sequential(*body)), _conv_bn(12, 16), _head(16))


def attention() -> nn.Module:
    """A vision transformer of one block: multi-head attention and hidden neurons, each with a LayerNorm."""
    return nn.Sequential(
        _Patches(16), _Block(16, heads=2, hidden=24), nn.LayerNorm(16), _Mean(), nn.Linear(16, CLASSES)
    )


def tied() -> nn.Module:
    """Two convolutions that share one weight."""
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    second.weight = first.weight
    return nn.Sequential(
        _conv_bn(3, 8), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU(), _conv_bn(8, 16), _head(16)
    )


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (plain, residual, concatenated, depthwise, grouped, flattened, gated, attention, tied)
}


def some_models(*names: str) -> Mapping[str, Callable[[], nn.Module]]:
    """The models of these names from `MODELS`, for a scheme that is tested in many settings."""
    return {name: MODELS[name] for name in names}


def lived_in(model: nn.Module, seed: int = 0, input_shape: tuple[int, ...] = INPUT_SHAPE) -> nn.Module:
    """Makes a model look trained: no parameter is zero, and BatchNorm is not the identity.

    Args:
        model: The model; changed in place, and returned in eval mode.
        seed: Seeds the parameters and the batches.
        input_shape: The shape of one sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    bound = math.sqrt(6 / p[0].numel())
                    p.copy_(uniform(p, -bound, bound))
                elif isinstance(module, nn.BatchNorm2d) and name == "weight":
                    p.copy_(uniform(p, 0.5, 1.5))
                else:
                    p.copy_(uniform(p, -0.5, 0.5))
        model.train()
        for _ in range(3):
            model(torch.randn(16, *input_shape, generator=generator) * 2 + 0.5)
    return model.eval()


def as_users_leave_it(model: nn.Module) -> nn.Module:
    """Changes a model, in place, in ways that users do and that do not change its outputs in eval mode.

    Its modules are in different modes, one parameter is frozen, the others have gradients, no weight is
    contiguous, and there is a hook.
    """
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for p in model.parameters():
        backwards = tuple(reversed(range(p.dim())))
        p.data = p.data.permute(backwards).contiguous().permute(backwards)
        p.grad = torch.ones_like(p)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    frozen.grad = None
    model.register_forward_hook(_look)
    return model


def _look(*_: object) -> None:
    """A hook that does nothing."""
