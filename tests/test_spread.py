"""How density is spread over layers, and what of them is left whole: for single weights and for channels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn

from autocompress import schemes
from autocompress.models import SmallResNet
from autocompress.scheme import Scheme, Theta
from autocompress.schemes.criteria import entry_scores
from autocompress.schemes.importance import channel_scores
from autocompress.schemes.patterns import modules_matching, per_module
from autocompress.schemes.ranking import best, best_by_lamp, best_with_floors
from autocompress.schemes.spread import Layer, allocate, erdos_renyi_kernel, removal_order
from autocompress.schemes.struct import Structure
from autocompress.testing import lived_in

# By magnitude: without a look at data.
Prune = partial(schemes.Prune, criterion="l2")
StructPrune = partial(schemes.StructPrune, criterion="l2", normalize="mean")
NeuronPrune = partial(schemes.NeuronPrune, criterion="l2", normalize="mean")


def project(scheme: Scheme, model: nn.Module, x: Tensor, density: float) -> Theta:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return scheme.pi(weights, density, scheme.analyze(model, x[:1]))


def small() -> tuple[nn.Module, Tensor]:
    return lived_in(SmallResNet(in_channels=3, classes=5)), torch.randn(2, 3, 8, 8)


def densities_of(theta: Theta) -> dict[str, float]:
    return {name: float(mask.float().mean()) for name, mask in theta.support.items()}


# The parts


def test_best_takes_the_first_of_equal_scores() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0])
    assert best([scores], 3)[0].tolist() == [True, True, False, True, False]
    assert best([scores], 5)[0].all() and best([scores], 1)[0].tolist() == [False, True, False, False, False]
    of_all = best([torch.ones(2, 3), torch.tensor([2.0, 1.0])], 5)
    assert [mask.tolist() for mask in of_all] == [[[True, True, True], [True, False, False]], [True, False]]


def test_best_is_the_same_set_in_any_memory_layout() -> None:
    torch.manual_seed(0)
    scores = torch.rand(8, 6, 3, 3)
    in_channels_last = best([scores.to(memory_format=torch.channels_last)], 100)[0]
    assert torch.equal(in_channels_last, best([scores], 100)[0]) and in_channels_last.sum() == 100
    tied = torch.zeros(8, 6, 3, 3).to(memory_format=torch.channels_last)
    assert best([tied], 17)[0].sum() == 17


@pytest.mark.parametrize("scores", ["distinct", "ties", "zeros", "sorted", "constant"])
def test_best_of_many_scores_is_what_sorting_them_says(scores: str) -> None:
    """So many that a sample tells where the threshold lies; in the worst order it tells nothing."""
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    x = {
        "distinct": x,
        "ties": (9 * x).round(),
        "zeros": (x - 0.7).relu(),
        "sorted": x.sort().values,
        "constant": x * 0,
    }[scores]
    for n in (1, 7, 5_000, 9_000, 19_999, 20_000):
        mask = torch.cat(best(x.split([3, 12_997, 7_000]), n))
        expected = x.sort(descending=True, stable=True).indices[:n]
        assert torch.equal(mask.nonzero()[:, 0], expected.sort().values)


def test_best_with_floors() -> None:
    masks = best_with_floors([torch.tensor([5.0, 4.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])], 3, [1, 2])
    assert [mask.tolist() for mask in masks] == [[True, False, False], [False, True, True]]
    masks = best_with_floors([torch.tensor([5.0, 0.4, 3.0]), torch.tensor([0.1, 0.2, 2.0])], 3, [1, 1])
    assert [mask.tolist() for mask in masks] == [[True, False, True], [False, False, True]]


@pytest.mark.parametrize("total", [6, 7, 23, 50, 117, 118])
def test_allocate_is_the_brute_force_order_of_levels(total: int) -> None:
    sizes, relative, floors = [10, 8, 100], [1.0, 0.4, 0.7], [1, 3, 2]
    # Every entry has a level at which its layer has room for it; those of the lowest levels are in.
    levels = [
        (-1.0 if n <= floor else n / size / a, i)
        for i, (size, a, floor) in enumerate(zip(sizes, relative, floors, strict=True))
        for n in range(1, size + 1)
    ]
    chosen = [i for _, i in sorted(levels)[:total]]
    assert allocate(total, sizes, relative, floors) == [chosen.count(i) for i in range(3)]


def test_uniform_allocation_is_exact() -> None:
    assert allocate(50, [10, 40, 50], [1.0, 1.0, 1.0], [1, 1, 1]) == [5, 20, 25]


def test_best_by_lamp_is_one_threshold_on_the_scores_of_the_paper() -> None:
    torch.manual_seed(0)
    layers = [torch.rand(n) for n in (5, 30, 12)]
    # The definition, entry by entry.
    scored = [
        (float(s / layer[layer >= s].sum()), i) for i, layer in enumerate(layers) for s in layer.double().float()
    ]
    for total in (3, 10, 40):
        kept = [i for _, i in sorted(scored, reverse=True)[:total]]
        masks = best_by_lamp(layers, total, [1, 1, 1])
        assert [int(mask.sum()) for mask in masks] == [kept.count(i) for i in range(3)]
        for s, mask in zip(layers, masks, strict=True):
            assert not mask.any() or mask.all() or s[mask].min() > s[~mask].max()


@pytest.mark.parametrize("order", ["any", "rising", "ties", "dead", "hidden"])
@pytest.mark.parametrize("floors", [[0, 0, 0, 0], [1, 700, 9_000, 20]])
def test_best_by_lamp_of_many_scores_is_what_sorting_them_says(order: str, floors: list[int]) -> None:
    """So many that a sample tells where the threshold lies; in the worst order it tells nothing."""
    generator = torch.Generator().manual_seed(0)
    layers = [a * torch.rand(n, generator=generator).square() for a, n in ((1, 20_000), (0.1, 5_000), (3, 9_000))]
    layers.append(torch.rand(40, generator=generator))
    for s in layers:
        s.copy_({"rising": s.sort().values, "ties": (9 * s).round(), "dead": s - 0.01}.get(order, s))
        s[::64] = {"hidden": 1e-3}.get(order, s[::64])  # the sample sees nothing but these
    rising = [s.clamp_min(0).sort().values for s in layers]
    lamps = [s / s.double().flip(0).cumsum(0).flip(0).float().clamp_min(1e-30) for s in rising]
    for n in (sum(floors) or 1, 10_000, 25_000, 34_039):
        masks = best_by_lamp(layers, n, floors)
        expected = [int(mask.sum()) for mask in best_with_floors(lamps, n, floors)]
        assert [int(mask.sum()) for mask in masks] == expected
        for s, mask in zip(layers, masks, strict=True):
            assert torch.equal(mask, best([s], int(mask.sum()))[0])


def test_a_layer_that_keeps_its_floor_alone_keeps_its_highest_scores() -> None:
    """The sample misses scores that dwarf all others of their layer, and so takes these for too important."""
    generator = torch.Generator().manual_seed(88)
    dwarfed, other = torch.rand(8_192, generator=generator).pow(4) / 2, torch.empty(6_528)
    dwarfed[::64] = torch.rand(128, generator=generator)
    dwarfed[1:8] = 1e4
    other.uniform_(generator=generator)
    dwarfed_mask, other_mask = best_by_lamp([dwarfed, other], 3_185, [8, 1])
    assert torch.equal(dwarfed_mask, best([dwarfed], 8)[0])
    assert torch.equal(other_mask, best([other], 3_177)[0])


def test_the_erdos_renyi_kernel() -> None:
    assert erdos_renyi_kernel([torch.Size([64, 16, 3, 3])]) == (64 + 16 + 3 + 3) / (64 * 16 * 9)


def test_chunks_leave_by_the_mean_of_their_members_and_dead_ones_first() -> None:
    scores = torch.tensor([9.0, 1.0, 2.0, 3.0, 8.0, 0.0, 0.0, 4.0, 4.0, 4.0])
    layers = [Layer(torch.arange(5), 2, 2, 1.0), Layer(torch.arange(5, 10), 2, 2, 1.0)]
    order = removal_order(scores, scores == 0, layers, "global")
    # Widths go 5 → 4 → 2: first one channel, then two. Chunks: [1], [2, 3] and [5], [6, 7], which is half dead.
    assert order.channels.tolist() == [5, 1, 6, 7, 2, 3]
    assert order.ends.tolist() == [0, 1, 2, 4, 6]
    assert order.n_dead == 1


# Prune


def test_uniform_and_erk_densities_of_single_weights() -> None:
    model, x = small()
    uniform = densities_of(project(Prune(spread="uniform"), model, x, 0.2))
    assert max(uniform.values()) - min(uniform.values()) < 0.01
    erk = densities_of(project(Prune(spread="erk"), model, x, 0.2))
    kernels = {name: erdos_renyi_kernel([model.get_parameter(name).shape]) for name in erk}
    thin = {name: d for name, d in erk.items() if d < 1}
    assert 0 < len(thin) < len(erk)  # the smallest layers stay whole
    levels = [density / kernels[name] for name, density in thin.items()]
    assert max(levels) / min(levels) == pytest.approx(1, abs=0.02)
    assert all(kernels[name] * min(levels) > 0.98 for name in erk.keys() - thin.keys())


def test_densities_by_module_are_ratios() -> None:
    model, x = small()
    spread = {"stages.2.*": 0.25, "stages.2.conv1": 0.5, "stages.1": 0.5}
    densities = densities_of(project(Prune(spread=spread), model, x, 0.2))
    full = densities["stem.0.weight"]
    assert densities["stages.2.conv1.weight"] == pytest.approx(full / 4, abs=0.005)  # the first match counts
    assert densities["stages.2.downsample.0.weight"] == pytest.approx(full / 4, abs=0.005)
    assert densities["stages.1.conv1.weight"] == pytest.approx(full / 2, abs=0.005)
    assert densities["stages.0.conv1.weight"] == pytest.approx(full, abs=0.005)


@pytest.mark.parametrize(
    "scheme", [Prune(criterion="lamp"), Prune(spread="lamp"), Prune(criterion="lamp", spread="lamp")]
)
def test_lamp_is_criterion_and_spread_alike(scheme: Prune) -> None:
    """One threshold on the LAMP scores of all weights."""
    model, x = small()
    theta = project(scheme, model, x, 0.1)
    scores = entry_scores("lamp", {n: p.detach() for n, p in model.named_parameters()}, theta.support)
    n_kept = sum(int(mask.sum()) for mask in theta.support.values())
    threshold = torch.cat([score.flatten() for score in scores.values()]).topk(n_kept).values[-1]
    for name, mask in theta.support.items():
        assert torch.equal(mask, scores[name] >= threshold), name


@pytest.mark.parametrize("spread", ["global", "uniform", "erk", "lamp", {"stages.*": 0.1}])
def test_every_spread_meets_the_density_to_the_weight(spread: Any) -> None:
    model, x = small()
    n_params = sum(p.numel() for p in model.parameters())
    scheme = Prune(spread=spread, min_keep={"stem": 100})
    for density in (0.9, 0.31, 0.05):
        theta = project(scheme, model, x, density)
        assert theta.kept == int(density * n_params)
        assert theta.support["stem.0.weight"].sum() >= 100


def test_skipped_layers_keep_every_weight_and_count() -> None:
    model, x = small()
    scheme = Prune(skip=["stem", "Linear"])
    theta = project(scheme, model, x, 0.1)
    assert "stem.0.weight" not in theta.support and "classifier.weight" not in theta.support
    assert theta.kept == int(0.1 * sum(p.numel() for p in model.parameters()))
    with pytest.raises(ValueError, match="Prune finds no"):
        project(Prune(skip="*"), model, x, 0.5)


# StructPrune

PUBLISHED = {  # ratio of removed channels: parameters, multiply-accumulates at 224 x 224
    0.0: (11_181_129, 1_821_669_385),
    0.05: (10_066_435, 1_632_000_245),
    0.10: (9_024_737, 1_474_061_545),
    0.20: (7_128_070, 1_178_374_212),
    0.30: (5_464_787, 905_419_253),
    0.40: (4_013_670, 677_198_550),
    0.50: (2_801_193, 486_947_849),
    0.60: (1_779_457, 315_407_593),
    0.70: (999_398, 187_320_644),
}


def test_uniform_widths_of_resnet18_have_the_published_counts() -> None:
    """A ResNet-18 of nine classes, thinned uniformly, as torch-pruning counts it."""
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=9).eval(), torch.randn(1, 3, 224, 224)
    scheme = StructPrune(spread="uniform", align=1)
    facts = scheme.analyze(model, torch.randn(1, 3, 64, 64))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for params, macs in PUBLISHED.values():
        theta = scheme.pi(weights, params / PUBLISHED[0.0][0], facts)
        assert theta.kept == params
        assert tp.utils.count_ops_and_params(scheme.realize(model, theta, facts), x) == (macs, params)


def projector(scheme: StructPrune, model: nn.Module, x: Tensor) -> Callable[[float], Theta]:
    """The C step as a function of the density."""
    facts = scheme.analyze(model, x[:1])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return lambda density: scheme.pi(weights, max(density, scheme.lowest_density(facts)), facts)


WIDTHS = {"stem.0": 16, "stages.0.conv1": 16, "stages.1.conv1": 32, "stages.2.conv1": 64}
DENSITIES = [0.95, 0.8, 0.5, 0.3, 0.1, 0.05]


def shares(theta: Theta) -> dict[str, float]:
    """The share of its channels that each layer keeps."""
    return {root: 1 - len(theta.plan["removed"][root]) / width for root, width in WIDTHS.items()}


@pytest.mark.parametrize("density", DENSITIES)
def test_uniform_keeps_the_same_share_of_channels_everywhere(density: float) -> None:
    model, x = small()
    kept = shares(projector(StructPrune(spread="uniform", min_keep=1), model, x)(density)).values()
    assert max(kept) - min(kept) <= 1 / 16  # a channel of the narrowest


@pytest.mark.parametrize("density", DENSITIES)
def test_widths_by_module_are_ratios_until_a_layer_is_whole(density: float) -> None:
    model, x = small()
    spread = {"stages.2": 0.25, "stages.1": 0.5}
    kept = shares(projector(StructPrune(spread=spread, min_keep=1), model, x)(density))
    level = max(kept["stages.1.conv1"] / 0.5, kept["stages.2.conv1"] / 0.25)
    for root, relative in {
        "stem.0": 1,
        "stages.0.conv1": 1,
        "stages.1.conv1": 0.5,
        "stages.2.conv1": 0.25,
    }.items():
        assert kept[root] == pytest.approx(min(1, relative * level), abs=1 / 16 + relative / 16)


def test_erk_leaves_small_layers_wider() -> None:
    model, x = small()
    kept = shares(projector(StructPrune(spread="erk"), model, x)(0.2))
    assert kept["stages.0.conv1"] > kept["stages.1.conv1"] > kept["stages.2.conv1"]
    # The weights of a layer thin on both sides: the square root of the kernel's ratio remains.
    kernels = [erdos_renyi_kernel([torch.Size([n, k, 3, 3])]) for n, k in ((32, 16), (64, 32))]
    ratio = kept["stages.1.conv1"] / kept["stages.2.conv1"]
    assert ratio == pytest.approx((kernels[0] / kernels[1]) ** 0.5, rel=0.1)


def test_lamp_of_channels_is_the_score_over_those_that_are_no_smaller() -> None:
    """Brute force over all channels."""
    model, x = small()
    scheme = StructPrune(spread="lamp", min_keep=1)
    facts = scheme.analyze(model, x[:1])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    scores = channel_scores("l2", facts.groups, weights, facts.roles, None).split([g.width for g in facts.groups])
    lamps = [
        (float(s / score[score >= s].sum()), group.root, c)
        for group, score in zip(facts.groups, scores, strict=True)
        for c, s in enumerate(score.double())
    ]
    removed = projector(scheme, model, x)(0.3).plan["removed"]
    n_removed = sum(map(len, removed.values()))
    gone = {(root, c) for _, root, c in sorted(lamps)[:n_removed]}
    assert gone == {(root, c) for root, channels in removed.items() for c in channels}


# Whole layers, floors, alignment


@pytest.mark.parametrize("align", [4, 8])
@pytest.mark.parametrize("spread", ["global", "uniform"])
def test_widths_are_multiples(align: int, spread: Any) -> None:
    model, x = small()
    n_params = sum(p.numel() for p in model.parameters())
    scheme = StructPrune(align=align, spread=spread, min_keep=3)
    facts = scheme.analyze(model, x[:1])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    lowest = scheme.lowest_density(facts)
    for density in [*DENSITIES[:-1], lowest]:
        theta = scheme.pi(weights, max(density, lowest), facts)
        realized = scheme.realize(model, theta, facts)
        widths = {m.out_channels for m in realized.modules() if isinstance(m, nn.Conv2d)}
        assert all(width % align == 0 for width in widths)
        assert theta.kept == sum(p.numel() for p in realized.parameters()) <= max(density, lowest) * n_params
    assert widths == {align}
    with pytest.raises(ValueError, match=f"lowest possible here is {lowest:.4g}"):
        scheme.pi(weights, 0.99 * lowest, facts)


def test_wide_layers_are_multiples_of_eight_and_narrow_ones_any_width() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 75, 3), nn.ReLU(), nn.Conv2d(75, 20, 3), nn.Flatten(), nn.Linear(320, 4)
    ).eval()
    scheme = StructPrune()
    facts = scheme.analyze(model, torch.zeros(1, 3, 8, 8))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    seen: set[tuple[int, int]] = set()
    for density in torch.linspace(scheme.lowest_density(facts), 0.99, 80).tolist():
        theta = scheme.pi(weights, density, facts)
        again = scheme.pi(theta.values, density, facts)
        assert again.plan == theta.plan
        realized = scheme.realize(model, theta, facts)
        seen.add((realized[0].out_channels, realized[2].out_channels))
    wide, narrow = {width for width, _ in seen}, {width for _, width in seen}
    assert {width for width in wide if width > 32} <= {75, 72, 64, 56, 48, 40}
    assert len({width for width in wide if width <= 32}) > 8
    assert len(narrow) > 8


def odd() -> tuple[nn.Module, Tensor]:
    """Layers of 12, 5 and 20 channels."""
    convs = (nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 1), nn.ReLU(), nn.Conv2d(5, 20, 1), nn.ReLU())
    return lived_in(nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))), torch.randn(
        2, 3, 8, 8
    )


def test_layers_too_narrow_for_the_alignment_are_left_whole_and_named() -> None:
    model, x = odd()
    scheme = StructPrune(align=8)
    with pytest.warns(UserWarning, match=r"^left at full width, as align=8 leaves them no narrower width: 2$"):
        facts = scheme.analyze(model, x[:1])
    theta = project_with(scheme, model, scheme.lowest_density(facts), facts)
    realized = scheme.realize(model, theta, facts)
    assert [realized[i].out_channels for i in (0, 2, 4)] == [8, 5, 8]
    barely = project_with(scheme, model, 0.999, facts)  # 20 goes to 16, or 12 to 8: a multiple at the first step
    realized = scheme.realize(model, barely, facts)
    assert [realized[i].out_channels for i in (0, 4)] in ([8, 20], [12, 16])


def project_with(scheme: StructPrune, model: nn.Module, density: float, facts: Structure) -> Theta:
    return scheme.pi({name: p.detach() for name, p in model.named_parameters()}, density, facts)


def test_alignment_counts_the_channels_of_a_layer_where_several_go_at_once() -> None:
    """Groups of a grouped convolution: four filters each, so that two of them make a multiple of eight."""
    convs = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=8), nn.ReLU(), nn.Conv2d(32, 16, 1))
    model = lived_in(nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)))
    scheme = StructPrune(align=8, min_keep=1)
    facts = scheme.analyze(model, torch.randn(1, 3, 8, 8))
    lowest = scheme.lowest_density(facts)
    for density in (0.8, 0.5, lowest):
        realized = scheme.realize(model, project_with(scheme, model, density, facts), facts)
        assert all(m.out_channels % 8 == 0 for m in realized.modules() if isinstance(m, nn.Conv2d))
    assert [realized[i].out_channels for i in (0, 2, 4)] == [8, 8, 8]


def test_floors_by_module() -> None:
    model, x = odd()
    scheme = StructPrune(min_keep={"0": 7, "4": 3})
    theta = projector(scheme, model, x)(0.0)
    assert {root: len(gone) for root, gone in theta.plan["removed"].items()} == {"0": 5, "2": 3, "4": 17}


@pytest.mark.parametrize(
    ("skip", "whole"),
    [
        (["stages.1.*"], {"stages.1.conv1"}),
        (["stages.1.conv1", "stem"], {"stages.1.conv1", "stem.0"}),  # a container means all that is in it
        (["stages.0.conv2"], {"stem.0"}),  # and with it what it is added to
        (["classifier"], set()),  # it puts out classes, which stay anyway; its inputs may go
        (["stages.2.*", "ReLU"], {"stages.2.conv1"}),
    ],
)
def test_skipped_layers_keep_all_their_channels(skip: list[str], whole: set[str]) -> None:
    model, x = small()
    theta = projector(StructPrune(skip=skip), model, x)(0.0)
    assert set(WIDTHS) - set(theta.plan["removed"]) == whole
    assert all(len(gone) == WIDTHS.get(root, len(gone) + 2) - 2 for root, gone in theta.plan["removed"].items())


@pytest.mark.parametrize("argument", [{"skip": ["layr"]}, {"spread": {"layr": 1.0}}, {"min_keep": {"layr": 3}}])
@pytest.mark.parametrize("scheme", [Prune, StructPrune])
def test_a_pattern_that_matches_nothing_is_refused(scheme: Any, argument: dict[str, Any]) -> None:
    model, x = small()
    with pytest.raises(
        ValueError, match=r"names 'layr', which matches no module.*has: stem, stages, pool, classif"
    ):
        scheme(**argument).analyze(model, x[:1])


def test_patterns_are_names_globs_and_types() -> None:
    model, _ = small()
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert modules_matching(model, ["Conv2d"], "skip") == convs
    assert modules_matching(model, ["stem"], "skip") == {"stem", "stem.0", "stem.1", "stem.2"}
    assert modules_matching(model, ["stem.*"], "skip") == {"stem.0", "stem.1", "stem.2"}
    assert "stages.1.bn1" in modules_matching(model, ["BasicBlock"], "skip")
    assert modules_matching(model, ["*"], "skip") == {name for name, _ in model.named_modules()}
    assert per_module(model, {"stem.0": 1, "stem": 2}, 3, "x") == (
        {"stem": 2, "stem.0": 1, "stem.1": 2, "stem.2": 2},
        3,
    )
    assert per_module(model, 5, 3, "x") == ({}, 5)


def test_neuron_prune_keeps_every_filter() -> None:
    features = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten())
    model = lived_in(nn.Sequential(*features, nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)))
    theta = projector(NeuronPrune(), model, torch.randn(2, 3, 8, 8))(0.0)
    assert {root: len(gone) for root, gone in theta.plan["removed"].items()} == {"5": 22}
    with pytest.raises(ValueError, match="NeuronPrune finds no channels"):
        NeuronPrune().analyze(*small())
