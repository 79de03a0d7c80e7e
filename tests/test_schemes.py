import copy
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.conformance.testing_models import some_models
from autocompress.gauges.macs import count_params
from autocompress.models import SmallResNet
from autocompress.scheme import Compose, Scheme, Theta
from autocompress.schemes import (
    FilterPrune,
    FilterPruneQuantize16,
    NeuronPrune,
    Prune,
    PruneQuantize16,
    Quantize16,
    StructPrune,
    StructPruneQuantize16,
)
from autocompress.schemes.groups import find_groups, first_channels, remove_channels, sizes_along
from autocompress.schemes.struct import Structure
from autocompress.testing import Case, SchemeConformance, lived_in, masked_model, run

# By magnitude: without a look at data.
MAGNITUDE: Any = {"criterion": "l2"}
GROUP_MAGNITUDE: Any = {"criterion": "l2", "normalize": "mean"}


class Structured(SchemeConformance):
    __test__ = False

    def unit_size(self, case: Case) -> int:
        """A channel with all that is coupled to it, in the dense model."""
        structure = case.facts[0] if isinstance(self.make_scheme(), Compose) else case.facts
        return max(largest_channel(structure, i) for i in range(len(structure.groups)))


def largest_channel(structure: Structure, i: int) -> int:
    group = structure.groups[i]
    sizes = torch.zeros(group.width, dtype=torch.long)
    for s in group.slices:
        shape = structure.shapes[s.parameter]
        sizes += torch.bincount(s.channels, minlength=group.width) * (shape.numel() // shape[s.dim])
    return int(sizes.max())


class TestPrune(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return Prune()


class TestStructPrune(Structured):
    def make_scheme(self) -> Scheme:
        return StructPrune()


# Criteria, spreads and restrictions in combination, on a few models and densities each.

FEW = (0.7, 0.2, 0.05)


class TestPruneByObdAndErk(SchemeConformance):
    models = some_models("residual", "flattened")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return Prune(criterion="obd", spread="erk", skip=["Linear"])


class TestPruneByTaylorAndLamp(SchemeConformance):
    models = some_models("depthwise")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return Prune(criterion="taylor", spread="lamp", min_keep=3)


class TestPruneAtRandomAndUniformly(SchemeConformance):
    models = some_models("gated")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return Prune(criterion="random", spread="uniform")


class TestStructPruneByTaylorAligned(Structured):
    models = some_models("residual", "concatenated")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPrune(criterion="taylor", align=4)

    def unit_size(self, case: Case) -> int:
        return 4 * super().unit_size(case)


class TestStructPruneByObdUniformly(Structured):
    models = some_models("depthwise", "flattened")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPrune(criterion="obd", spread="uniform", normalize="none")


class TestStructPruneByMedianAndErk(Structured):
    models = some_models("concatenated", "gated")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPrune(criterion="fpgm", spread="erk")


class TestStructPruneByActivation(Structured):
    models = some_models("residual", "gated")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPrune(criterion="activation")


class TestStructPruneByBetaRank(Structured):
    models = some_models("plain", "depthwise")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPrune(criterion="beta_rank", spread="lamp", min_keep=3)


class TestFilterPruneByHRankSkipping(Structured):
    models = some_models("residual", "flattened")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return FilterPrune(criterion="hrank", skip=["Linear"])


class TestStructPruneByScaleAndStage(Structured):
    models = some_models("residual")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPrune(criterion="bn_scale", spread={"2": 0.5, "3.*": 0.25}, skip=["0.0"])


class TestNeuronPrune(Structured):
    models = some_models("flattened")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return NeuronPrune(criterion="l1")


class TestFilterPrune(Structured):
    models = some_models("plain", "residual", "concatenated", "grouped")  # what StructPrune does, and less

    def make_scheme(self) -> Scheme:
        return FilterPrune()


class TestBFloat16(SchemeConformance):
    def make_scheme(self) -> Scheme:
        return Quantize16(dtype="bf16")


class TestFloat16(SchemeConformance):
    models = some_models("residual", "grouped", "attention")

    def make_scheme(self) -> Scheme:
        return Quantize16(dtype="fp16")


class TestPruneQuantize16(SchemeConformance):
    models = some_models("concatenated", "depthwise", "attention")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return PruneQuantize16()


class TestStructPruneQuantize16(Structured):
    models = some_models("residual", "flattened", "tied")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return StructPruneQuantize16()


class TestFilterPruneQuantize16(Structured):
    models = some_models("gated", "grouped", "plain")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return FilterPruneQuantize16()


def analyzed(scheme: Scheme, model: nn.Module, x: Tensor, density: float) -> tuple[Theta, nn.Module, nn.Module]:
    """θ, the masked model and the realized one."""
    facts = scheme.analyze(model, x[:1])
    theta = scheme.pi({name: p.detach() for name, p in model.named_parameters()}, density, facts)
    masked = masked_model(scheme, model, theta)
    return theta, masked, scheme.realize(masked, theta, facts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """A model whose BatchNorm statistics are those of ``x`` and whose other BatchNorm parameters are random."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 0.5
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


# Prune


@pytest.mark.parametrize("min_keep", [1, 7])
@pytest.mark.parametrize("density", [0.6, 0.35, 0.25])
def test_prune_is_brute_force_top_k(min_keep: int, density: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight *= 0.01  # below any threshold: only the floor keeps weights here
    theta, _, _ = analyzed(Prune(**MAGNITUDE, min_keep=min_keep), model, torch.randn(1, 6), density)
    n_params, n_biases = count_params(model), 9 + 8 + 4
    expected: set[tuple[str, int]] = set()
    entries = []
    for layer in (0, 2, 4):
        name = f"{layer}.weight"
        flat = model.get_parameter(name).detach().abs().flatten().tolist()
        ranked = sorted(range(len(flat)), key=lambda i: -flat[i])
        expected |= {(name, i) for i in ranked[:min_keep]}
        entries += [(flat[i], name, i) for i in ranked[min_keep:]]
    entries.sort(reverse=True)
    left = int(density * n_params + 1e-9) - n_biases - len(expected)
    expected |= {(name, i) for _, name, i in entries[:left]}
    kept = {(name, i) for name, mask in theta.support.items() for i in mask.flatten().nonzero()[:, 0].tolist()}
    assert kept == expected


def test_prune_loses_no_weight_to_rounding() -> None:
    # 0.29 x 100 is 28.999999999999996 in floating point; 29 of 100 is what was asked.
    model = nn.Linear(10, 10, bias=False)
    for percent in range(1, 100):
        theta, _, _ = analyzed(Prune(**MAGNITUDE), model, torch.randn(1, 10), percent / 100)
        assert theta.kept == percent


# StructPrune and FilterPrune


def test_struct_prune_removes_the_channels_of_a_residual_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    model = with_statistics(SmallResNet(), torch.randn(32, 1, 8, 8))
    theta, masked, realized = analyzed(StructPrune(**GROUP_MAGNITUDE), model, x, 0.2)
    assert isinstance(realized, SmallResNet)
    first, second, third = realized.stages
    # The stem, the first block's output and its identity shortcut are one group, and so on down the network.
    assert realized.stem[0].out_channels == first.conv2.out_channels == second.conv1.in_channels < 16
    assert second.conv2.out_channels == second.downsample[0].out_channels == third.conv1.in_channels < 32
    assert third.conv2.out_channels == third.downsample[0].out_channels == realized.classifier.in_features < 64
    for block in realized.stages:
        assert block.conv1.out_channels == block.bn1.num_features == block.conv2.in_channels
        assert len(block.bn2.running_mean) == block.conv2.out_channels
    assert realized.classifier.out_features == 10
    assert count_params(realized) == theta.kept <= 0.2 * count_params(model)
    assert relative_error(run(realized, x), run(masked, x)) < 1e-5


def test_struct_prune_removes_the_channels_of_lowest_group_norm() -> None:
    """Brute force: a filter, its BatchNorm and what the classifier reads of it, squared and summed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3)
    ).eval()
    norm = model[1]
    nn.init.uniform_(norm.weight, 0.1, 2.0)
    nn.init.uniform_(norm.bias, -1, 1)
    norms = [
        model[0].weight[c].square().sum()
        + model[0].bias[c] ** 2
        + norm.weight[c] ** 2
        + norm.bias[c] ** 2
        + model[5].weight[:, c].square().sum()
        for c in range(10)
    ]
    order = sorted(range(10), key=lambda c: norms[c].item())
    per_channel = 2 * 9 + 1 + 2 + 3
    n_params = count_params(model)
    for gone in range(9):
        theta, _, _ = analyzed(
            StructPrune(**GROUP_MAGNITUDE),
            model,
            torch.randn(1, 2, 5, 5),
            (n_params - gone * per_channel) / n_params,
        )
        assert theta.plan["removed"] == {"0": sorted(order[:gone])}


def test_zero_channels_go_whatever_the_target() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)))
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 0
        model[2].weight[:, 3 * 36 : 4 * 36] = 0
    theta, _, realized = analyzed(StructPrune(**GROUP_MAGNITUDE), model, torch.randn(1, 3, 8, 8), 1.0)
    assert theta.plan["removed"] == {"0": [3]}
    assert realized[0].out_channels == 7


def test_filter_prune_keeps_every_neuron() -> None:
    features = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
    model = lived_in(nn.Sequential(*features, nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)))
    x = torch.randn(4, 3, 8, 8)
    lowest = FilterPrune(**GROUP_MAGNITUDE).lowest_density(FilterPrune(**GROUP_MAGNITUDE).analyze(model, x[:1]))
    _, masked, realized = analyzed(FilterPrune(**GROUP_MAGNITUDE), model, x, lowest)
    assert realized[0].out_channels == 2
    assert (realized[5].in_features, realized[5].out_features) == (2 * 4, 24)
    assert relative_error(run(realized, x), run(masked, x)) < 1e-5
    _, _, narrower = analyzed(StructPrune(**GROUP_MAGNITUDE), model, x, lowest)
    assert narrower[5].out_features < 24


def test_a_model_without_filters_is_refused_by_filter_prune() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    with pytest.raises(ValueError, match="FilterPrune finds no channels"):
        FilterPrune(**GROUP_MAGNITUDE).analyze(model, torch.randn(1, 6))
    with pytest.raises(ValueError, match=r"StructPrune finds no channels .*; there are none but those of the out"):
        StructPrune(**GROUP_MAGNITUDE).analyze(nn.Linear(6, 9), torch.randn(1, 6))
    with pytest.raises(ValueError, match="Prune finds no linear or convolutional weights"):
        Prune(**MAGNITUDE).analyze(nn.BatchNorm1d(6), torch.randn(1, 6))


@pytest.mark.parametrize("min_keep", [1, 5])
def test_min_keep_is_the_floor_of_every_group(min_keep: int) -> None:
    model = lived_in(SmallResNet(in_channels=3, classes=5))
    scheme, x = StructPrune(**GROUP_MAGNITUDE, min_keep=min_keep), torch.randn(2, 3, 8, 8)
    lowest = scheme.lowest_density(scheme.analyze(model, x[:1]))
    _, masked, realized = analyzed(scheme, model, x, lowest)
    widths = {m.out_channels for m in realized.modules() if isinstance(m, nn.Conv2d)}
    assert widths == {min_keep}
    assert relative_error(run(realized, x), run(masked, x)) < 1e-5


@pytest.mark.parametrize("scheme", [Prune, StructPrune, FilterPrune])
def test_min_keep_must_be_positive(scheme: type) -> None:
    with pytest.raises(ValueError, match="min_keep=0"):
        scheme(min_keep=0)


def assert_left_whole(layers: tuple[nn.Module, ...], whole: str, *still: int) -> None:
    """The layers of ``whole`` are named in a warning; those at ``still`` keep their width, others do not."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(4, 3, 8, 8)
    run(model, x)
    model = lived_in(model)
    scheme = StructPrune(**GROUP_MAGNITUDE)
    with pytest.warns(UserWarning, match=f"left at full width.*: {whole}$"):
        facts = scheme.analyze(model, x[:1])
    theta = scheme.pi({n: p.detach() for n, p in model.named_parameters()}, scheme.lowest_density(facts), facts)
    masked = masked_model(scheme, model, theta)
    realized = scheme.realize(masked, theta, facts)
    assert relative_error(run(realized, x), run(masked, x)) < 1e-5
    for i, (before, after) in enumerate(zip(model, realized, strict=True)):
        if isinstance(before, nn.Conv2d):
            assert after.out_channels == (before.out_channels if i in still else scheme.min_keep), i


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.LayerNorm([8, 6, 6])])
def test_channels_that_a_norm_mixes_are_left_whole_and_named(norm: nn.Module) -> None:
    assert_left_whole((nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU()), "0", 0)


def test_no_part_of_a_concatenation_is_emptied() -> None:
    """Filtered one by one, concatenated channels are two groups; each layer that they reach keeps its floor."""
    model = lived_in(RandomNetwork([("plain", 6), ("concat", 5), ("depthwise", 0)], hidden=0, flatten=False))
    with torch.no_grad():
        model.layers[1][0].weight *= 1e-3  # by saliency alone the concatenated layer would go first, and all of it
        model.layers[1][1].weight *= 1e-3
        model.layers[1][1].bias *= 1e-3
    scheme, x = StructPrune(**GROUP_MAGNITUDE), torch.randn(3, 3, 8, 8)
    facts = scheme.analyze(model, x[:1])
    assert [group.width for group in facts.groups] == [6, 5]
    for density in (0.7, 0.5, scheme.lowest_density(facts)):
        theta, masked, realized = analyzed(scheme, model, x, density)
        widths = [realized.layers[i][0].out_channels for i in range(3)]
        assert min(widths) >= 2 and widths[2] == widths[0] + widths[1]
        assert relative_error(run(realized, x), run(masked, x)) < 1e-5
    assert widths == [2, 2, 4]
    assert theta.kept == count_params(realized)


def test_batchnorm_without_scale_and_shift() -> None:
    """A removed channel still emits a constant in the masked model; nothing reads it."""
    model = lived_in(
        nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.BatchNorm2d(12, affine=False),
            nn.Sigmoid(),
            nn.Conv2d(12, 8, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    )
    x = torch.randn(4, 3, 8, 8)
    _, masked, realized = analyzed(StructPrune(**GROUP_MAGNITUDE), model, x, 0.2)
    assert float(run(masked[:2], x).abs().amax((0, 2, 3)).min()) > 0
    assert relative_error(run(realized, x), run(masked, x)) < 1e-5


# Sizes are predicted, not measured: the prediction must be exact.

SIZED = [
    "resnet18",
    pytest.param("mobilenet_v2", marks=pytest.mark.slow),
    pytest.param("densenet121", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("architecture", SIZED)
def test_predicted_sizes_are_the_real_ones(architecture: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(architecture, weights=None, num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    groups = find_groups(model, x)
    starts = first_channels(groups)
    # Any order, down to one channel a group.
    removable = torch.cat([start + torch.randperm(end - start)[1:] for start, end in pairwise(starts)])
    order = removable[torch.randperm(len(removable))]
    sizes = sizes_along(groups, {name: p.shape for name, p in model.named_parameters()}, order)
    assert int(sizes[0]) == count_params(model)
    for n in (1, len(order) // 3, len(order)):
        gone = order[:n]
        removed = {
            group.root: sorted((gone[(gone >= start) & (gone < end)] - start).tolist())
            for group, (start, end) in zip(groups, pairwise(starts), strict=True)
        }
        assert count_params(remove_channels(model, groups, removed)) == int(sizes[n])


def test_removal_equals_the_mask_on_resnet18() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    model = with_statistics(torchvision.models.resnet18(num_classes=10), torch.randn(8, 3, 64, 64))
    for density in (0.5, 0.1):
        theta, masked, realized = analyzed(StructPrune(**GROUP_MAGNITUDE), model, x, density)
        assert count_params(realized) == theta.kept <= density * count_params(model)
        assert relative_error(run(realized, x), run(masked, x)) < 1e-5


# Random networks


class RandomNetwork(nn.Module):
    """A chain of blocks of the given kinds and widths, then a classifier with or without hidden neurons."""

    def __init__(self, blocks: list[tuple[str, int]], hidden: int, flatten: bool) -> None:
        super().__init__()
        self.kinds = [kind for kind, _ in blocks]
        self.layers = nn.ModuleList()
        width = 3
        for kind, outputs in blocks:
            groups, outputs = (width, width) if kind == "depthwise" else (1, outputs)
            conv = nn.Conv2d(width, outputs, 3, padding=1, groups=groups, bias=kind == "concat")
            shortcut = nn.Conv2d(width, outputs, 1) if kind == "residual" and outputs != width else nn.Identity()
            gate = nn.Conv2d(outputs, outputs, 1) if kind == "gated" else nn.Identity()
            self.layers.append(nn.ModuleList([conv, nn.BatchNorm2d(outputs), shortcut, gate]))
            width = width + outputs if kind == "concat" else outputs
        self.pool = nn.AdaptiveAvgPool2d(2 if flatten else 1)
        width *= 4 if flatten else 1
        head = [nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 4)] if hidden else [nn.Linear(width, 4)]
        self.head = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        for kind, (conv, norm, shortcut, gate) in zip(self.kinds, self.layers, strict=True):
            y = torch.nn.functional.silu(norm(conv(x)))
            if kind == "residual":
                y = y + shortcut(x)
            elif kind == "concat":
                y = torch.cat([x, y], dim=1)
            elif kind == "gated":
                y = y * torch.sigmoid(gate(y.mean((2, 3), keepdim=True)))
            x = y
        return self.head(self.pool(x).flatten(1))


KINDS = st.sampled_from(["plain", "residual", "concat", "depthwise", "gated"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    blocks=st.lists(st.tuples(KINDS, st.integers(3, 9)), min_size=1, max_size=5),
    hidden=st.sampled_from([0, 6]),
    flatten=st.booleans(),
    density=st.floats(0.02, 1.0),
    seed=st.integers(0, 2**16),
)
def test_random_networks_are_realized_exactly(
    blocks: list[tuple[str, int]], hidden: int, flatten: bool, density: float, seed: int
) -> None:
    model = lived_in(RandomNetwork([("plain", 6), *blocks], hidden, flatten), seed)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    scheme = StructPrune(**GROUP_MAGNITUDE, min_keep=1)
    facts = scheme.analyze(model, x[:1])
    density = max(density, scheme.lowest_density(facts))
    theta = scheme.pi({name: p.detach() for name, p in model.named_parameters()}, density, facts)
    masked = masked_model(scheme, model, theta)
    realized = scheme.realize(masked, theta, facts)
    unit = max(largest_channel(facts, i) for i in range(len(facts.groups)))
    assert theta.kept == count_params(realized)
    assert density - unit / count_params(model) < theta.kept / count_params(model) <= density
    assert relative_error(run(realized, x), run(masked, x)) < 1e-5


# Quantize16


def test_sixteen_bit_type_follows_the_device_and_the_request() -> None:
    model = nn.Linear(4, 3)
    assert Quantize16().analyze(model, torch.zeros(1, 4)) == "bf16"  # on a CPU
    assert Quantize16(dtype="fp16").analyze(model, torch.zeros(1, 4)) == "fp16"
    with pytest.raises(ValueError, match="dtype='int8'; it must be auto, fp16 or bf16"):
        Quantize16(dtype="int8")  # type: ignore[arg-type]  # what is tested


def test_sixteen_bits_round_to_nearest_and_halve_the_bytes() -> None:
    model = lived_in(SmallResNet(in_channels=3, classes=5))
    x = torch.randn(2, 3, 8, 8)
    theta, _, realized = analyzed(Quantize16(dtype="bf16"), model, x, 1.0)
    for name, w in model.named_parameters():
        stored = theta.values[name]
        assert stored.dtype == torch.bfloat16
        # bfloat16 has 8 significant bits: a rounding to nearest is off by 2^-9 of the next power of two at most.
        assert ((stored.float() - w).abs() <= w.abs() * 2.0**-8).all(), name
    floats = [t for t in realized.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.bfloat16}
    assert run(realized, x).dtype == torch.float32


def test_composition_prunes_and_casts() -> None:
    model = lived_in(SmallResNet(in_channels=3, classes=5))
    x = torch.randn(2, 3, 8, 8)
    theta, _, realized = analyzed(Compose(StructPrune(**GROUP_MAGNITUDE), Quantize16()), model, x, 0.3)
    _, _, pruned = analyzed(StructPrune(**GROUP_MAGNITUDE), model, x, 0.3)
    assert theta.kept == count_params(realized) == count_params(pruned)
    for cast, p in zip(realized.parameters(), pruned.parameters(), strict=True):
        assert torch.equal(cast, p.to(torch.bfloat16))


def test_no_warning_where_nothing_is_left_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StructPrune(**GROUP_MAGNITUDE).analyze(copy.deepcopy(SmallResNet()), torch.randn(1, 1, 8, 8))
