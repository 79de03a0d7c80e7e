"""Networks of the kinds that users of structured pruning report trouble with, each small.

What is removed is removed exactly, and what stays whole is named with the reason. Residual streams, grouped
convolutions, squeeze and excitation and the like are in test_groups, in all combinations.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.scheme import Evidence, Scheme
from autocompress.schemes import FilterPrune, LowRank, Prune, Quantize16, StructPrune
from autocompress.testing import masked_model, run

CLASSES = 4
IMAGE, TOKENS = (3, 8, 8), (6, 16)


class Network(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def around(module: nn.Module, width: int = 8) -> nn.Sequential:
    """The module behind a convolution and in front of another one."""
    return nn.Sequential(conv(3, 8), module, conv(width, 6), nn.ReLU(), head(6))


def concatenated_then_flattened() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.fc(torch.cat([m.a(x), m.b(x)], 1).flatten(1)).relu())

    return Network(forward, a=conv(3, 6), b=conv(3, 10), fc=nn.Linear(16 * 64, 12), out=nn.Linear(12, CLASSES))


def called_three_times() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(3):
            x = m.norm(m.conv(x)).relu()
        return m.head(x)

    return Network(forward, stem=conv(3, 8), conv=conv(8, 8), norm=nn.BatchNorm2d(8), head=head(8))


def a_module_of_two_names() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.alias(m.conv(m.stem(x).relu()).relu()).relu())

    shared = conv(8, 8)
    return Network(forward, stem=conv(3, 8), conv=shared, alias=shared, head=head(8))


def parameters_of_its_own() -> nn.Module:
    """A scale, positions and a class token, in shapes of their own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = (m.stem(x) * m.scale + m.position).flatten(2).transpose(1, 2)
        tokens = torch.cat([m.token.expand(len(tokens), -1, -1), tokens], 1)
        return m.out(tokens.relu()[:, 0] + tokens.mean(1))

    own = {"scale": (1, 8, 1, 1), "position": (8, 8, 8), "token": (1, 1, 8)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in own.items()}
    return Network(forward, stem=conv(3, 8), out=nn.Linear(8, CLASSES), **parameters)


class OwnLinear(nn.Module):
    """A layer of the user's own, its weight the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b


def recurrent(layer: nn.Module) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.fc(m.layer(m.stem(x))[0][:, -1]).relu())

    width = layer.hidden_size * (1 + layer.bidirectional)
    return Network(
        forward, stem=nn.Linear(16, 8), layer=layer, fc=nn.Linear(width, 12), out=nn.Linear(12, CLASSES)
    )


def pyramid() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        fine = m.a(x).relu()
        coarse = F.interpolate(m.coarse(m.b(fine).relu()), size=fine.shape[-2:], mode="bilinear")
        return m.head(m.fine(fine) + coarse)

    layers = {"a": conv(3, 8), "b": conv(8, 16, stride=2), "fine": conv(8, 6, 1), "coarse": conv(16, 6, 1)}
    return Network(forward, **layers, head=head(6))


def split_in_unequal_parts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).split([4, 8], 1)
        return m.head((m.left(left) + m.right(right)).relu())

    return Network(forward, a=conv(3, 12), left=conv(4, 6), right=conv(8, 6), head=head(6))


def parts_that_pile_up() -> nn.Module:
    """As YOLO's C2f: halves of a convolution, one worked on again and again, all concatenated."""

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = list(m.a(x).chunk(2, 1))
        parts.extend(layer(parts[-1]) for layer in m.layers)
        return m.head(F.silu(m.out(torch.cat(parts, 1))))

    layers = nn.ModuleList(conv(6, 6) for _ in range(2))
    return Network(forward, a=conv(3, 12), layers=layers, out=conv(24, 8, 1), head=head(8))


def attention_by_einsum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (project(m.norm(x)).unflatten(-1, (4, 4)) for project in (m.q, m.k, m.v))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k).div(2).softmax(-1)
        x = x + m.o(torch.einsum("bhlm,bmhd->blhd", scores, v).flatten(2))
        return m.out(m.mlp(x).mean(1))

    mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    layers = {name: nn.Linear(16, 16) for name in "qkvo"}
    return Network(forward, **layers, norm=nn.LayerNorm(16), mlp=mlp, out=nn.Linear(16, CLASSES))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2)
    return nn.Sequential(nn.Linear(16, 16), stack, nn.Flatten(), nn.Linear(6 * 16, CLASSES))


def overwritten_in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x += m.norm(m.b(x)).relu_()
        x[:, :, 0] *= 0.5
        return m.head(x.clamp_(max=4).add_(1.0))

    return Network(forward, a=conv(3, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8), head=head(8))


def written_by_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x[:, 2:4] = 1.0
        return m.head(m.b(x).relu())

    return Network(forward, a=conv(3, 8), b=conv(8, 8, 1), head=head(8))


def of_two_ways() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((m.b(x) if x.mean() > 0 else m.a(x)).relu())

    return Network(forward, a=conv(3, 8), b=conv(3, 8), head=head(8))


def buffers_of_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(m.a(x) * m.mask).relu())

    model = Network(forward, a=conv(3, 8), b=conv(8, 6), head=head(6))
    model.register_buffer("mask", torch.rand(1, 8, 1, 1) + 0.5)
    return model


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(8))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


class Fixed(nn.Module):
    """Code that holds on to eight channels."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def asserted(x: Tensor) -> Tensor:
    assert x.shape[1] == 8
    return x


def gram(x: Tensor) -> Tensor:
    mixed = x.flatten(2)
    return ((mixed @ mixed.transpose(1, 2)).softmax(-1) @ mixed).view_as(x)


def hooked() -> nn.Module:
    model = around(nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: output * torch.arange(1.0, 9).view(1, 8, 1, 1))
    return model


def in_parametrization(normalize: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = around(nn.ReLU())
    model[0] = normalize(model[0])
    return model


def standardized() -> nn.Module:
    """The weight of a convolution, standardized filter by filter in the forward pass."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w - m.w.mean((1, 2, 3), keepdim=True)
        return m.head(m.b(F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-3))).relu())

    return Network(forward, w=nn.Parameter(torch.randn(8, 3, 3, 3)), b=conv(8, 6), head=head(6))


def weight_read_twice() -> nn.Module:
    """A decoder that is the encoder transposed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(F.linear(m.a(x.flatten(1)).relu(), m.a.weight.t()))

    return Network(forward, a=nn.Linear(192, 12), out=nn.Linear(192, CLASSES))


def u_net() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        fine = m.a(x).relu()
        return m.head(m.c(torch.cat([m.up(m.b(fine).relu()), fine], 1)).relu())

    layers = {"a": conv(3, 6), "b": conv(6, 12, stride=2), "up": nn.ConvTranspose2d(12, 6, 2, 2), "c": conv(12, 8)}
    return Network(forward, **layers, head=head(8))


def shared_norm() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(m.b(m.norm(m.a(x)).relu())).relu())

    return Network(forward, a=conv(3, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8), head=head(8))


def blurred(width: Callable[[Tensor], int]) -> nn.Module:
    """A low-pass filter in front of the stride (Zhang, ICML 2019), expanded to so many channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        return m.head(m.b(F.conv2d(x, m.blur.expand(width(x), 1, 3, 3), stride=2, groups=width(x))).relu())

    model = Network(forward, a=conv(3, 8), b=conv(8, 6), head=head(6))
    model.register_buffer("blur", torch.rand(1, 1, 3, 3))
    return model


def cross_attention() -> nn.Module:
    """Queries, keys and values of three widths."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.out(m.attention(q, k, v, need_weights=False)[0].mean(1))

    layers = {"q": conv(3, 8), "k": conv(3, 6), "v": conv(3, 10), "out": nn.Linear(8, CLASSES)}
    return Network(forward, **layers, attention=nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True))


def scaled_residual() -> nn.Module:
    """A block of ConvNeXt: depthwise, LayerNorm over the last dimension, a learned scale for each channel."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.down(F.gelu(m.up(m.norm(m.filter(x).permute(0, 2, 3, 1))))) * m.gamma
        return m.head(x + y.permute(0, 3, 1, 2))

    layers = {"stem": conv(3, 8), "filter": conv(8, 8, groups=8), "norm": nn.LayerNorm(8)}
    mlp = {"up": nn.Linear(8, 24), "down": nn.Linear(24, 8), "gamma": nn.Parameter(torch.rand(8))}
    return Network(forward, **layers, **mlp, head=head(8))


def modulated() -> nn.Module:
    """Scale and shift of a BatchNorm that has none of its own, computed from the input (FiLM)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scale, shift = m.film(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return m.head(m.b((m.norm(m.a(x)) * (1 + scale) + shift).relu()))

    norm = nn.BatchNorm2d(8, affine=False)
    return Network(forward, a=conv(3, 8), norm=norm, film=nn.Linear(3, 16), b=conv(8, 6), head=head(6))


def gated_linear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x.flatten(1))
        return m.out(x + m.down(F.silu(m.up(x)) * m.gate(x)))

    layers = {
        "a": nn.Linear(192, 12),
        "up": nn.Linear(12, 16),
        "gate": nn.Linear(12, 16),
        "down": nn.Linear(16, 12),
    }
    return Network(forward, **layers, out=nn.Linear(12, CLASSES))


def frozen(n: int | None = None) -> nn.Module:
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), head(8))
    for layer in list(model)[:n]:
        layer.requires_grad_(False)
    return model


def of_one_channel() -> nn.Module:
    return nn.Sequential(
        conv(3, 1), conv(1, 2), nn.BatchNorm2d(2), conv(2, 1), nn.Flatten(), nn.Linear(64, CLASSES)
    )


EXACT: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        *(concatenated_then_flattened, called_three_times, a_module_of_two_names, parameters_of_its_own, pyramid),
        *(
            parts_that_pile_up,
            encoder,
            overwritten_in_place,
            buffers_of_channels,
            standardized,
            u_net,
            shared_norm,
        ),
        *(gated_linear, frozen, of_one_channel, cross_attention, scaled_residual, modulated),
    )
} | {
    "custom_layer": lambda: nn.Sequential(nn.Flatten(), OwnLinear(192, 12), nn.ReLU(), OwnLinear(12, CLASSES)),
    "depthwise_multiplier": lambda: around(nn.Conv2d(8, 16, 3, groups=8), 16),
    "transposed_depthwise": lambda: around(nn.ConvTranspose2d(8, 16, 2, 2, groups=8), 16),
    "transposed_in_groups": lambda: around(nn.ConvTranspose2d(8, 12, 2, 2, groups=4), 12),
    "blur": lambda: blurred(lambda x: x.shape[1]),
    "maxout": lambda: around(Fixed(lambda x: x.unflatten(1, (-1, 2)).amax(2)), 4),
    "pixel_unshuffle": lambda: nn.Sequential(nn.PixelUnshuffle(2), conv(12, 16), nn.PixelShuffle(2), head(4)),
    "dropout": lambda: around(nn.Sequential(nn.Dropout2d(0.3), nn.AlphaDropout(0.2))),
    "flattened_norm": lambda: nn.Sequential(
        conv(3, 6), nn.Flatten(), nn.BatchNorm1d(384), nn.Linear(384, 16), nn.PReLU(16), nn.Linear(16, CLASSES)
    ),
    "classes_by_convolution": lambda: nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, CLASSES), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "frozen_stem": lambda: frozen(2),
    "repeated": lambda: around(Fixed(lambda x: x.repeat_interleave(2, 1)), 16),
    "data_parallel": lambda: nn.DataParallel(around(nn.ReLU())),
    "bfloat16": lambda: frozen().bfloat16(),
    "float64": lambda: frozen().double(),
}

WHOLE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {  # which layers stay, and why
    "lstm": (lambda: recurrent(nn.LSTM(8, 10, batch_first=True)), "layer.weight_ih_l0", "lstm|rnn|unsafe_split"),
    "layers_of_lstm": (
        lambda: recurrent(nn.LSTM(8, 10, 2, batch_first=True, bidirectional=True)),
        "layer.weight_ih_l1_reverse",
        "lstm|rnn|unsafe_split",
    ),
    "gru": (lambda: recurrent(nn.GRU(8, 10, batch_first=True)), "layer.weight_hh_l0", "gru|unsafe_split"),
    "unequal_parts": (split_in_unequal_parts, "a", "by their place"),
    "einsum": (attention_by_einsum, "q", "product of activations"),
    "by_place": (written_by_place, "a", "by their place"),
    "two_ways": (of_two_ways, "a|b", "does not use them"),
    "permutation": (lambda: around(Permuted()), "0", "table look-up"),
    "hard_coded": (lambda: around(Fixed(lambda x: x.view(-1, 8, 8, 8).flip(2))), "0", "counts on their number"),
    "asserted": (lambda: around(Fixed(asserted)), "0", "counts on their number"),
    "width_in_a_number": (lambda: around(Fixed(lambda x: x * x.shape[1] ** -0.5)), "0", "counts on their number"),
    "attention_over_channels": (lambda: around(Fixed(gram)), "0", "takes all of them together"),
    "response_norm": (lambda: around(nn.LocalResponseNorm(3)), "0", "padding"),
    "rms_norm": (lambda: around(Fixed(lambda x: F.rms_norm(x.movedim(1, 3), (8,)).movedim(3, 1))), "0", "mean"),
    "fourier": (lambda: around(Fixed(lambda x: torch.fft.fft2(x).real)), "0", "nothing is known of .*fft"),
    "unfolded": (lambda: around(Fixed(lambda x: F.fold(F.unfold(x, 2, stride=2), 8, 2, stride=2))), "0", "im2col"),
    "blur_of_fixed_width": (lambda: blurred(lambda x: 8), "a", "counts on their number"),
    "maxout_of_fixed_width": (
        lambda: around(Fixed(lambda x: x.view(-1, 4, 2, 8, 8).amax(2)), 4),
        "0",
        "counts on their number",
    ),
    "hook": (hooked, "0", "size is fixed"),
    "weight_norm": (lambda: in_parametrization(nn.utils.parametrizations.weight_norm), "0.param", "weight_norm"),
    "spectral_norm": (lambda: in_parametrization(nn.utils.parametrizations.spectral_norm), "0.param", "mv"),
    "weight_read_twice": (weight_read_twice, "a", "size is fixed"),
}


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """The model, its normalisation no identity, and a batch in its type."""
    torch.manual_seed(0)
    model = make()
    first = next(p for p in model.parameters() if p.dim() > 1)
    x = torch.randn(3, *(TOKENS if first.shape[-1] == 16 and first.dim() == 2 else IMAGE), dtype=first.dtype)
    with torch.no_grad():
        model.train()(x)
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(torch.rand_like(p) + 0.2)
    return model.eval(), x


def compressed(scheme: Scheme, model: nn.Module, x: Tensor) -> list[str]:
    """Compresses as far as possible and half of the way, compares with the masked model; what warnings said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = scheme.analyze(model, x[:1])
    if isinstance(scheme, Prune):
        evidence = Evidence(model, lambda: [(x, torch.arange(3))], lambda out, y: F.cross_entropy(out.float(), y))
        facts = scheme.observe(evidence, facts)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    lowest = scheme.lowest_density(facts)
    exact = 1e-5 if x.dtype != torch.bfloat16 else 2e-2
    for density in (lowest, (1 + lowest) / 2):
        theta = scheme.pi(weights, density, facts)
        masked = masked_model(scheme, model, theta)
        realized = scheme.realize(masked, theta, facts)
        expected = run(masked, x).float()
        away = (run(realized, x).float() - expected).abs().max()
        assert away <= max(exact, scheme.tolerance) * expected.abs().max()
        assert realized.train()(x).shape == (3, CLASSES)
    assert sum(1 for _ in model.parameters()) == len(weights), "the dense model is not what it was"
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", EXACT)
def test_nothing_stays_whole(name: str) -> None:
    assert compressed(StructPrune(criterion="l2", min_keep=1), *made(EXACT[name])) == []


@pytest.mark.parametrize("name", WHOLE)
def test_what_stays_whole_is_named_with_the_reason(name: str) -> None:
    make, layer, reason = WHOLE[name]
    said = compressed(StructPrune(criterion="l2", min_keep=1), *made(make))
    pattern = rf"^left at full width, as .*(?:{reason}).*: (?:.*, )?(?:{layer})"
    assert any(re.search(pattern, message) for message in said), said


@pytest.mark.parametrize(
    "name", ["a_module_of_two_names", "encoder", "frozen", "frozen_stem", "bfloat16", "float64"]
)
def test_single_weights_go_by_gradients(name: str) -> None:
    model, x = made(EXACT[name])
    trainable = [p.requires_grad for p in model.parameters()]
    assert compressed(Prune(criterion="obd"), model, x) == []
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "whole"),
    [(encoder, r"1\.layers\.0\.linear1, 1\.layers\.0\.linear2"), (hooked, "0"), (weight_read_twice, "a")],
)
def test_layers_that_something_holds_on_to_are_not_factorized(make: Callable[[], nn.Module], whole: str) -> None:
    (said,) = compressed(LowRank(), *made(make))
    assert re.search(rf"^left whole, as the model uses more of them than what they compute: {whole}", said)


def test_a_model_that_stays_whole_is_refused_with_the_reasons() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.b(m.a(x.flatten(1)).relu()).topk(4, 1).values)

    model, x = made(lambda: Network(forward, a=nn.Linear(192, 8), b=nn.Linear(8, 6), out=nn.Linear(4, CLASSES)))
    top = "nothing is known of the operation topk: b"
    for scheme, why in {
        StructPrune(skip=["a"]): "skip names them: a",
        FilterPrune(): "they are not what FilterPrune removes: a",
        StructPrune(min_keep=8): "min_keep keeps all of them: a",
        StructPrune(align=16): "align=16 leaves them no narrower width: a",
    }.items():
        with pytest.raises(ValueError, match=f"finds no channels in .*; left at full width, as {top}; {why}$"):
            scheme.analyze(model, x[:1])


def test_integers_stay_integers_in_16_bits() -> None:
    """Numbers of words, which an embedding looks up."""
    model, x = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, CLASSES)).eval(), torch.tensor([[3, 299]])
    scheme = Quantize16(dtype="bf16")
    facts = scheme.analyze(model, x)
    theta = scheme.pi(dict(model.named_parameters()), 1.0, facts)
    away = (run(scheme.realize(model, theta, facts), x) - run(model, x)).abs().max()
    assert away <= scheme.tolerance * run(model, x).abs().max()


def test_a_model_that_cannot_compute_in_16_bits_is_refused() -> None:
    model, x = made(lambda: around(Fixed(lambda x: torch.fft.fft2(x).real)))
    with pytest.raises(ValueError, match=r"^Quantize16 cannot run this model in bf16: .*BFloat16"):
        Quantize16(dtype="bf16").analyze(model, x[:1])
