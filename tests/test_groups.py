import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.models import SmallResNet
from autocompress.schemes import StructPrune
from autocompress.schemes.groups import find_groups, remove_channels
from autocompress.task import channels_last
from autocompress.testing import fingerprint, masked_model, run, telling, telling_error

CLASSES = 4
TOLERANCE = 1e-4  # of what two images differ by


class Chain(nn.Module):
    """Blocks one after the other, then a classifier with or without hidden neurons."""

    def __init__(self, blocks: list[tuple[str, int]], hidden: int, flatten: bool) -> None:
        super().__init__()
        made, width = [], 3
        for kind, units in blocks:
            block = BLOCKS[kind](width, 4 * units)
            made.append(block)
            width = block.width
        self.blocks = nn.Sequential(*made)
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        width *= 4 if flatten else 1
        head = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, CLASSES)] if hidden else []
        self.head = nn.Sequential(*(head or [nn.Linear(width, CLASSES)]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(x)).flatten(1))


class Plain(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.width = after
        self.conv, self.norm = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Residual(Plain):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shortcut(x)


class Concat(Plain):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.width = before + after

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


class Depthwise(Plain):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, before)
        self.conv = nn.Conv2d(before, before, 3, padding=1, groups=before)


class Grouped(Plain):
    """An even number of groups: few and wide, or many and narrow."""

    def __init__(self, before: int, after: int, groups: int = 2) -> None:
        super().__init__(after, after)
        self.expand = nn.Conv2d(before, after, 1)
        self.conv = nn.Conv2d(after, after, 3, padding=1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(self.expand(x)))


class ManyGroups(Grouped):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, after // 2)


class Gated(Plain):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.squeeze, self.excite = nn.Conv2d(after, 4, 1), nn.Conv2d(4, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class GroupNormed(Plain):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.norm = nn.GroupNorm(4, after)


class LayerNormed(Plain):
    """Over channels, as transformers have it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.norm = nn.LayerNorm(after)
        self.mlp = nn.Sequential(nn.Linear(after, 2 * after), nn.GELU(), nn.Linear(2 * after, after))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return (x + self.mlp(self.norm(x))).permute(0, 3, 1, 2)


class Attention(Plain):
    """Multi-head attention over positions, heads and their width worked out from shapes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.qkv, self.proj = nn.Linear(after, 3 * after), nn.Linear(after, after)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens.transpose(1, 2).reshape(n, c, h, w)


class Torch(Plain):
    """PyTorch's own attention, behind a convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.attention = nn.MultiheadAttention(after, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        return (tokens + self.attention(tokens, tokens, tokens)[0]).transpose(1, 2).reshape(x.shape)


class Shuffled(Plain):
    """A shuffle of channels between two groups, half of which are then worked on (Ma et al. 2018)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(after // 2, after // 2)
        self.width = after
        self.expand = nn.Conv2d(before, after, 1)
        self.inner = nn.Conv2d(after // 2, after // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.expand(x).chunk(2, dim=1)
        x = torch.cat([left, super().forward(F.relu(self.inner(right)))], dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Pixels(Plain):
    """Channels to positions, and pooled back."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.width = after // 4

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pixel_shuffle(super().forward(x), 2), 2)


class Upsampled(Plain):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.up = nn.ConvTranspose2d(after, after, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.interpolate(self.up(super().forward(x)), scale_factor=0.5), 1)


class Padded(Plain):
    """Shortcuts without parameters (He et al. 2016, option A), where the block is wider than its input."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, max(before, after))
        self.pad = self.width - before

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    block.__name__: block
    for block in (
        *(Plain, Residual, Concat, Depthwise, Grouped, ManyGroups, Gated, GroupNormed, LayerNormed, Attention),
        *(Torch, Shuffled, Pixels, Upsampled, Padded),
    )
}


def random_weights(model: nn.Module, x: Tensor) -> nn.Module:
    """No parameter is constant, and BatchNorm has statistics."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(torch.rand_like(p) + 0.2)
        for _ in range(2):
            model.train()(x)
    return model.eval()


def analyzed(scheme: StructPrune, model: nn.Module, x: Tensor) -> tuple[object, list[str]]:
    """The facts, and which layers the warnings name, as patterns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts = scheme.analyze(model, x[:1])
    layers = [layer for warning in caught for layer in str(warning.message).split(": ", 1)[1].split(", ")]
    named = [re.escape(re.sub(r" \(.*", "", layer)).replace(r"\*", r"\d+") for layer in layers]
    return facts, named


def layers_of(model: nn.Module) -> dict[str, int]:
    """The width of what each layer puts out."""
    return {
        name: m.out_channels if hasattr(m, "out_channels") else m.out_features
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear))
    }


def assert_exact(model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """At a density between the lowest and 1 the realized model computes what the masked one does."""
    scheme = StructPrune(criterion="l2", min_keep=1)
    facts, named = analyzed(scheme, model, x)
    lowest = scheme.lowest_density(facts)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for density in (lowest, lowest + share * (1 - lowest)):
        theta = scheme.pi(weights, density, facts)
        masked = telling(masked_model(scheme, model, theta), x, centred=True)
        realized = scheme.realize(masked, theta, facts)
        assert telling_error(run(realized, x), run(masked, x)) < TOLERANCE
        assert theta.kept == sum(p.numel() for p in realized.parameters())
        assert theta.kept / sum(w.numel() for w in weights.values()) <= density
        assert all(p.numel() for p in realized.parameters())
        assert run(realized.train(), x).shape == (len(x), CLASSES)
        if density == lowest:
            widths = layers_of(realized)
            for name, width in layers_of(model).items():
                said = any(re.fullmatch(pattern, name) for pattern in named)
                assert widths[name] < width or said or (name.startswith("head") and width == CLASSES), name
    return realized


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    blocks=st.lists(st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(1, 3)), min_size=1, max_size=4),
    hidden=st.sampled_from([0, 6]),
    flatten=st.booleans(),
    share=st.floats(0.0, 1.0),
)
def test_random_networks_are_pruned_exactly_and_nothing_goes_unsaid(
    blocks: list[tuple[str, int]], hidden: int, flatten: bool, share: float
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6)
    assert_exact(random_weights(Chain([("Plain", 2), *blocks], hidden, flatten), x), x, share)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_every_block_is_pruned_exactly(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6)
    assert_exact(random_weights(Chain([("Plain", 2), (kind, 2), ("Plain", 3)], 0, False), x), x, 0.4)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_the_comparison_tells_that_one_channel_is_another(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6)
    realized = assert_exact(random_weights(Chain([("Plain", 2), (kind, 2), ("Plain", 3)], 0, False), x), x, 0.4)
    right = run(realized.eval(), x)
    weights = [p for p in realized.parameters() if p.dim() > 1 and len(p) > 1]
    for weight in weights:
        before = weight.detach().clone()
        with torch.no_grad():
            weight[:2] = before[[1, 0]]
            assert telling_error(run(realized, x), right) > 3 * TOLERANCE
            weight.copy_(before)
    assert len(weights) >= 2


@pytest.mark.parametrize(
    "kind",
    [
        "Plain",
        "Residual",
        "Concat",
        "Depthwise",
        "Grouped",
        "ManyGroups",
        "Gated",
        "GroupNormed",
        "Pixels",
        "Upsampled",
    ],
)
def test_blocks_of_which_nothing_is_left_whole(kind: str) -> None:
    model = Chain([("Plain", 2), (kind, 2), ("Plain", 3)], 0, False).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_groups(model, torch.randn(1, 3, 6, 6))


def widths_at_the_lowest(model: nn.Module, x: Tensor, min_keep: int = 1) -> nn.Module:
    """The model with as few channels as possible; it computes what the masked one does."""
    scheme = StructPrune(criterion="l2", min_keep=min_keep)
    facts, _ = analyzed(scheme, model, x)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    theta = scheme.pi(weights, scheme.lowest_density(facts), facts)
    masked = telling(masked_model(scheme, model, theta), x, centred=True)
    realized = scheme.realize(masked, theta, facts)
    assert telling_error(run(realized, x), run(masked, x)) < TOLERANCE
    return realized


def test_a_grouped_convolution_loses_whole_groups_or_the_same_of_each() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    many = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, groups=8), nn.ReLU(), Head(48))
    realized = widths_at_the_lowest(many, x, min_keep=2)
    assert (realized[0].out_channels, realized[2].in_channels, realized[2].out_channels) == (6, 6, 12)
    assert (realized[2].groups, realized[2].weight.shape[1]) == (2, 3)
    few = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, groups=2), nn.ReLU(), Head(48))
    realized = widths_at_the_lowest(few, x, min_keep=3)
    assert (realized[0].out_channels, realized[2].in_channels, realized[2].out_channels) == (6, 6, 6)
    assert (realized[2].groups, realized[2].weight.shape[1]) == (2, 3)


def test_group_norm_loses_whole_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.GroupNorm(6, 24), nn.ReLU(), Head(24))
    realized = widths_at_the_lowest(model, torch.randn(2, 3, 6, 6), min_keep=2)
    assert (realized[0].out_channels, realized[1].num_groups, realized[1].num_channels) == (8, 2, 8)


class Head(nn.Sequential):
    def __init__(self, width: int, pool: type[nn.Module] = nn.AdaptiveAvgPool2d) -> None:
        super().__init__(pool(1), nn.Flatten(), nn.Linear(width, CLASSES))


@pytest.mark.parametrize(
    ("conv", "norm", "pool", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d, (2, 3, 16)),
        (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d, (2, 3, 6, 6, 6)),
        (nn.ConvTranspose1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d, (2, 3, 16)),
        (nn.ConvTranspose2d, nn.InstanceNorm2d, nn.AdaptiveMaxPool2d, (2, 3, 6, 6)),
        (nn.ConvTranspose3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d, (2, 3, 4, 4, 4)),
    ],
)
def test_convolutions_of_every_kind(
    conv: type[nn.Module], norm: type[nn.Module], pool: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    layers = (conv(3, 8, 3), norm(8, affine=True), nn.PReLU(8), conv(8, 12, 3, groups=4), nn.PReLU(12))
    model = random_weights(nn.Sequential(*layers, conv(12, 6, 1), Head(6, pool)), x)
    realized = widths_at_the_lowest(model, x)
    assert [realized[i].out_channels for i in (0, 3, 5)] == [2, 3, 1]
    assert realized[1].num_features == 2 and realized[4].num_parameters == 3


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False)]
)
def test_a_normalisation_without_tensors_knows_how_many_channels_it_has(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), Head(8)).eval()
    realized = widths_at_the_lowest(model, torch.randn(2, 3, 6, 6), min_keep=2)
    assert realized[1].num_features == realized[0].out_channels == 2


def test_layers_that_share_their_weights_shrink_together() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    second.weight = first.weight
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), first, nn.ReLU(), second, nn.ReLU(), Head(8))
    realized = widths_at_the_lowest(model, torch.randn(2, 3, 6, 6), min_keep=2)
    assert realized[2].weight is realized[4].weight and realized[2].weight.shape[:2] == (2, 2)
    assert realized[2].bias is not realized[4].bias


class TwoHeads(nn.Module):
    """A second classifier that is used in training alone, as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = Plain(3, 8), Plain(8, 8)
        self.side, self.head = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Dropout(0.5), Head(6)), Head(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        out = self.head(self.body(x))
        return (out, self.side(x)) if self.training else out


def test_heads_of_train_mode_keep_their_classes_and_fit() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    realized = widths_at_the_lowest(random_weights(TwoHeads(), x), x)
    assert (realized.side[0].in_channels, realized.side[0].out_channels) == (1, 1)
    assert [out.shape for out in realized.train()(x)] == [(4, CLASSES), (4, CLASSES)]


def test_a_model_that_cannot_be_trained_is_pruned_as_it_infers() -> None:
    class InferenceAlone(TwoHeads):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise NotImplementedError("no training here")
            return self.head(self.body(self.stem(x)))

    with pytest.warns(UserWarning) as caught:
        groups = find_groups(InferenceAlone(), torch.randn(1, 3, 6, 6))
    said = [str(warning.message) for warning in caught]
    assert said[0] == "train mode was not looked at, the model fails in it: no training here"
    assert said[1] == "left at full width, as the forward pass does not use them: side.0, side.2.2"
    assert [group.root for group in groups] == ["stem.conv", "body.conv"]


def lost(module: nn.Module, what: str, reason: str) -> None:
    """The first layer of the model stays whole, for the reason, and the one behind it does not."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), module, nn.Conv2d(8, 6, 1), nn.ReLU(), Head(6)).eval()
    with pytest.warns(UserWarning, match=f"^left at full width, as .*{reason}.*: {what}$"):
        groups = find_groups(model, torch.randn(1, 3, 6, 6))
    assert "2" in [group.root for group in groups] and "0" not in [group.root for group in groups]


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * x.softmax(1), "softmax"),
        (lambda x: x - x.mean(1, keepdim=True), "mean"),
        (lambda x: x + torch.arange(8.0).view(1, 8, 1, 1), "fixed"),
        (lambda x: x[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])], "table"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: torch.cat([x[:, :3], x[:, 3:]], 1), "slice"),
        (lambda x: x.cumsum(1), "sum"),
        (lambda x: x.unfold(1, 1, 1).squeeze(-1), "unfold"),
        (lambda x: x.view(1, 8, 6, 6) + 1, "counts on their number"),
        (lambda x: x[:, :1] * x, "slice"),
    ],
)
def test_what_the_forward_pass_fixes_is_left_whole_and_named(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    lost(Lambda(function), "0", reason)


def test_layers_of_operations_that_are_not_known_are_named() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 6, 1), Head(6)
    )
    with pytest.warns(UserWarning, match=r"nothing is known of .*weight_norm.*: 0\.param"):
        assert [group.root for group in find_groups(model, torch.randn(1, 3, 6, 6))] == ["2"]


def test_group_norm_over_all_channels_is_left_whole_and_named() -> None:
    lost(nn.GroupNorm(1, 8), "0", "GroupNorm takes all of them together")
    lost(nn.LayerNorm([8, 6, 6]), "0", "LayerNorm takes all of them together")


def test_layers_that_repeat_are_named_once() -> None:
    blocks = ((nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 3, 1), nn.GroupNorm(1, 3)) for _ in range(5))
    model = nn.Sequential(*(nn.Sequential(*block) for block in blocks), nn.Conv2d(3, 8, 1), Head(8))
    with pytest.warns(UserWarning, match=r"^left .*: \*\.0 \(5 layers\), \*\.2 \(5 layers\)$"):
        find_groups(model, torch.randn(1, 3, 6, 6))


def test_everything_else_is_left_as_it_was() -> None:
    """Modes module by module, what is trainable, hooks, attributes; under no_grad; the dense model bit for bit."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = random_weights(Chain([("Plain", 2), ("Residual", 3), ("Gated", 2)], 6, True), x)
    calls: list[str] = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append("hook"))
    model.note = {"made": "here"}
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.ones_like(p)
    before = fingerprint(model)
    with torch.no_grad():
        groups = find_groups(model, x[:1])
        thinner = remove_channels(model, groups, {groups[0].root: [0, 2]})
    assert fingerprint(model) == before
    assert [m.training for m in thinner.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in thinner.parameters()] == [p.requires_grad for p in model.parameters()]
    assert thinner.note == {"made": "here"} and all(p.grad is None for p in thinner.parameters())
    assert [n for n, _ in thinner.named_modules()] == [n for n, _ in model.named_modules()]
    calls.clear()
    thinner(x)
    assert calls == ["hook"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_channels_of_groups_that_there_are_not_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Head(8))
    groups = find_groups(model, torch.randn(1, 3, 6, 6))
    with pytest.raises(ValueError, match="the model has no channels to remove in conv9"):
        remove_channels(model, groups, {"0": [1], "conv9": [0]})


def test_groups_do_not_depend_on_the_weights() -> None:
    """A saved plan is realized in a fresh model, whose layers may put out zeros."""
    torch.manual_seed(0)
    blocks = [(kind, 2) for kind in sorted(BLOCKS)]
    trained, x = random_weights(Chain(blocks, 6, False), torch.randn(2, 3, 6, 6)), torch.randn(1, 3, 6, 6)
    fresh = copy.deepcopy(trained)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [[(g.root, g.width) for g in find_groups(model, x)] for model in (trained, fresh)]
    assert found[0] == found[1]


def test_the_groups_do_not_depend_on_the_memory_layout() -> None:
    """In channels_last pooling works with views of memory."""
    model, x = SmallResNet(in_channels=3), torch.randn(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = find_groups(model, x)
        found = find_groups(channels_last(copy.deepcopy(model)), x.to(memory_format=torch.channels_last))
    assert [(g.root, g.width) for g in found] == [(g.root, g.width) for g in expected]
    assert len(found) == 6
