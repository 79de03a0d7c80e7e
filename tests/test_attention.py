"""Attention and LayerNorm that have lost heads and channels, against the layers that they were."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import maxvit, swin_transformer

from autocompress.schemes import StructPrune
from autocompress.schemes.attention import ThinAttention, known_attention, make_thin
from autocompress.schemes.groups import find_groups
from autocompress.schemes.layernorm import make_thin_norm
from autocompress.testing import masked_model, run


def thin(module: nn.Module) -> nn.Module:
    """The thin form of a module of which nothing is gone."""
    form = copy.deepcopy(module)
    make_thin(form, module)
    assert type(form) is not type(module)
    return form


def stirred(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / 2)
    return module.eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads", "padding"])
def test_attention_computes_what_pytorch_does(batch_first: bool, settings: dict, mask: str | None) -> None:
    attention = stirred(nn.MultiheadAttention(8, 2, batch_first=batch_first, **settings))
    n, lengths, widths = 3, (5, 4, 4), (8, settings.get("kdim", 8), settings.get("vdim", 8))
    streams = [
        torch.randn((n, length, width) if batch_first else (length, n, width))
        for length, width in zip(lengths, widths, strict=True)
    ]
    hidden = torch.rand(5, 4) < 0.3
    hidden[:, 0] = False  # everybody sees something
    given = {
        None: {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(5, 4)},
        "heads": {"attn_mask": torch.randn(2 * n, 5, 4)},
        "padding": {"key_padding_mask": hidden[:n], "attn_mask": hidden},
    }[mask]
    for asked in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        expected, actual = attention(*streams, **given, **asked), thin(attention)(*streams, **given, **asked)
        torch.testing.assert_close(actual, expected)


def test_attention_of_one_stream_and_without_a_batch() -> None:
    attention = stirred(nn.MultiheadAttention(8, 2))
    for x in (torch.randn(5, 3, 8), torch.randn(5, 8)):
        torch.testing.assert_close(thin(attention)(x, x, x), attention(x, x, x))
    assert known_attention(nn.MultiheadAttention(8, 2, add_bias_kv=True)) is None
    assert known_attention(nn.MultiheadAttention(8, 2, add_zero_attn=True)) is None


@pytest.mark.parametrize(
    "kind", [swin_transformer.ShiftedWindowAttention, swin_transformer.ShiftedWindowAttentionV2]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "shift"), [((8, 8), (2, 2)), ((7, 10), (2, 1)), ((8, 8), (0, 2)), ((4, 8), (2, 2))]
)
def test_windows_compute_what_torchvision_does(
    kind: type[nn.Module], bias: bool, size: tuple[int, int], shift: tuple[int, int]
) -> None:
    """Images that are no multiple of the window, no larger than it, and shifts along one dimension alone."""
    attention = stirred(kind(12, [4, 4], list(shift), 3, qkv_bias=bias, proj_bias=bias))
    x = torch.randn(2, *size, 12)
    torch.testing.assert_close(run(thin(attention), x), run(attention, x))


def test_grids_compute_what_torchvision_does() -> None:
    attention = stirred(maxvit.RelativePositionalMultiHeadAttention(12, 4, 9))
    x = torch.randn(2, 5, 9, 12)
    torch.testing.assert_close(run(thin(attention), x), run(attention, x))


@pytest.mark.parametrize("affine", [True, False])
def test_layernorm_computes_what_it_does_beside_zeros(affine: bool) -> None:
    norm = stirred(nn.LayerNorm(12, elementwise_affine=affine))
    kept = torch.tensor([0, 3, 4, 9])
    x = torch.zeros(3, 5, 12).index_copy(2, kept, 3 * torch.randn(3, 5, 4) + 2)
    narrow = copy.deepcopy(norm)
    if affine:
        narrow.weight, narrow.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    make_thin_norm(narrow, 4)
    torch.testing.assert_close(narrow(x[..., kept]), norm(x)[..., kept])
    assert narrow(x[..., kept].bfloat16()).dtype == torch.bfloat16


class Encoder(nn.Module):
    """A stem, PyTorch's own encoder layers, and a classifier."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 2, 2)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **settings) for _ in range(2))
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def lowest(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with as little as possible left; it computes what the masked one does."""
    scheme = StructPrune(criterion="l2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts = scheme.analyze(model, x[:1])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    theta = scheme.pi(weights, scheme.lowest_density(facts), facts)
    masked = masked_model(scheme, model, theta)
    realized = scheme.realize(masked, theta, facts)
    torch.testing.assert_close(run(realized, x), run(masked, x), rtol=1e-5, atol=1e-5)
    assert theta.kept == sum(p.numel() for p in realized.parameters())
    return realized


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_lose_heads_neurons_and_channels_of_the_stream(norm_first: bool) -> None:
    x = torch.randn(3, 3, 8, 8)
    model = stirred(Encoder(norm_first=norm_first))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing stays whole
        find_groups(model, x[:1])
    realized = lowest(model, x)
    attention, norm = realized.layers[0].self_attn, realized.layers[0].norm1
    assert isinstance(attention, ThinAttention)
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (2, 4, 2)
    assert attention.in_proj_weight.shape == (24, 2) and attention.out_proj.weight.shape == (2, 8)
    assert (norm.normalized_shape, norm.dense_width) == ((2,), 16)
    assert "dense_width" not in vars(model.layers[0].norm1)
    clone = pickle.loads(pickle.dumps(realized))
    assert torch.equal(run(clone, x), run(realized, x))
    clone.train()(x).sum().backward()
    assert all(p.grad is not None for p in clone.parameters())


def test_what_was_pruned_can_be_pruned_once_more() -> None:
    x = torch.randn(3, 3, 8, 8)
    model = stirred(Encoder())
    scheme = StructPrune(criterion="l2")
    facts = scheme.analyze(model, x[:1])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    theta = scheme.pi(weights, 0.6, facts)
    half = scheme.realize(masked_model(scheme, model, theta), theta, facts)
    assert half.layers[0].self_attn.num_heads > 2 and half.head.in_features > 2
    realized = lowest(half, x)
    assert realized.layers[0].self_attn.num_heads == 2


class Looks(nn.Module):
    """Something reads the attention's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y, weights = self.attention(x, x, x)
        return self.head(weights @ y).mean(1)


class Shifted(nn.Module):
    """A LayerNorm over what is not zero where a channel is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(x).sigmoid())).relu()).mean(1)


@pytest.mark.parametrize(
    ("model", "layer"), [(Looks(), "attention.in_proj_weight"), (Shifted(), "stem")], ids=["weights", "sigmoid"]
)
def test_what_would_not_be_exact_is_left_whole_and_named(model: nn.Module, layer: str) -> None:
    with pytest.warns(UserWarning, match=f"^left at full width, as the forward pass counts .*: {layer}$"):
        find_groups(stirred(model), torch.randn(1, 4, 6))
    lowest(model, torch.randn(3, 4, 6))
