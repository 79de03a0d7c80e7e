import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autocompress.conformance.testing_models import some_models
from autocompress.export import Provenance, export
from autocompress.formats import bundle
from autocompress.models import SmallResNet
from autocompress.scheme import Compose, Scheme, Theta
from autocompress.schemes import LowRank, Quantize16
from autocompress.schemes.rank_choice import Matrices, choose_ranks
from autocompress.schemes.spectrum import Spectrum
from autocompress.testing import Case, SchemeConformance, lived_in, masked_model, run

FEW = (0.7, 0.2, 0.05)  # densities, where the scheme itself is checked at more of them


def largest_rank_one(facts: Matrices) -> int:
    return max(sum(shape) for shape in facts.shapes.values())


class TestLowRank(SchemeConformance):
    models = some_models("plain", "residual", "depthwise", "flattened", "attention")

    def make_scheme(self) -> Scheme:
        return LowRank()

    def unit_size(self, case: Case) -> int:
        return largest_rank_one(case.facts)


class TestLowRankOfTwo(TestLowRank):
    models = some_models("gated", "grouped", "plain")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return LowRank(min_rank=2)


class TestLowRankQuantize16(SchemeConformance):
    models = some_models("residual", "grouped", "attention")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return Compose(LowRank(), Quantize16(dtype="bf16"))

    def unit_size(self, case: Case) -> int:
        return largest_rank_one(case.facts[0])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def compressed(
    model: nn.Module, x: Tensor, density: float, scheme: LowRank | None = None
) -> tuple[Theta, nn.Module, nn.Module]:
    """θ, the masked model and the realized one."""
    scheme = scheme or LowRank()
    facts = scheme.analyze(model, x[:1])
    theta = scheme.pi(weights_of(model), max(density, scheme.lowest_density(facts)), facts)
    masked = masked_model(scheme, model, theta)
    return theta, masked, scheme.realize(masked, theta, facts)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("layer", [nn.Linear(40, 12), nn.Linear(12, 40), nn.Conv2d(6, 20, 3)])
@pytest.mark.parametrize("density", [0.6, 0.3])
def test_the_nearest_matrix_of_its_rank(layer: nn.Module, density: float) -> None:
    """Eckart & Young: the truncated singular value decomposition."""
    torch.manual_seed(0)
    scheme, x = (
        LowRank(),
        torch.randn(2, 6, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, layer.in_features),
    )
    theta, _, realized = compressed(layer, x, density)
    rank = theta.plan["ranks"][""]
    weight, found = (w.detach().flatten(1).double() for w in (layer.weight, scheme.delta(theta)["weight"]))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert (weight - found).norm() <= (1 + 1e-6) * (weight - nearest).norm()
    # Where two singular values are close their vectors are less certain than the distance.
    torch.testing.assert_close(found, nearest, atol=1e-5, rtol=0)
    assert not theta.support["weight"].any()  # none of its entries is free
    m, n = nearest.shape
    assert theta.kept == rank * (m + n) + m == sum(p.numel() for p in realized.parameters())
    first, second = realized
    norms = first.weight.detach().flatten(1).norm(dim=1), second.weight.detach().flatten(1).norm(dim=0)
    torch.testing.assert_close(norms[0], norms[1])  # the factors share the scale


def test_a_first_convolution_of_many_filters_in_channels_last() -> None:
    """A kernel over few inputs, with more filters than entries each, laid out as a study has it: VGG's first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = model.eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    theta, masked, realized = compressed(model, x, 0.5)
    assert "0" in theta.plan["ranks"]
    assert error(run(realized, x), run(masked, x)) < 1e-5


def of_spectrum(name: str, m: int, n: int) -> Tensor:
    """A matrix whose singular values fall in some way, in 64 bits."""
    torch.manual_seed(0)
    random, i = torch.randn(m, n, dtype=torch.double), torch.arange(min(m, n))
    u, _, v = torch.linalg.svd(random, full_matrices=False)
    values = {
        "random": torch.linalg.svdvals(random),
        "falling slowly": 1 / (1 + i),
        "falling fast": torch.exp(-0.2 * i),
        "a gap": torch.where(i < 24, 1 - i / 30, 1e-3),
        "low rank": torch.where(i < 24, 1 - i / 30, 0.0),
    }
    if name == "rows of many scales":
        return random * 10 ** (-6 * torch.rand(m, 1))
    return (u * values[name]) @ v


SPECTRA = ("random", "falling slowly", "falling fast", "a gap", "low rank", "rows of many scales")


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(64, 288), (160, 64)])
def test_the_error_is_that_of_the_singular_value_decomposition(spectrum: str, m: int, n: int) -> None:
    """Whatever the spectrum, the scale, the rank and the layout in memory."""
    exact = of_spectrum(spectrum, m, n)
    for scale, rank in ((1.0, 6), (1e-22, 20), (1e20, 24), (0.05, 40)):
        weight = (exact * (scale / exact.norm())).float().view(m, -1, 2, 2)
        if rank > 20:
            weight = weight.contiguous(memory_format=torch.channels_last)
        first, second = Spectrum.of(weight, rank=rank).factors(weight, rank)
        assert (first.shape, second.shape) == ((rank, n // 4, 2, 2), (m, rank, 1, 1))
        matrix = weight.flatten(1).double()
        error = (second.flatten(1).double() @ first.flatten(1).double() - matrix).norm()
        least = torch.linalg.svdvals(matrix)[rank:].norm()
        assert error <= 1.00001 * least + 1e-6 * matrix.norm(), (scale, rank, float(error / matrix.norm()))


def test_64_bits_are_for_spectra_that_need_them() -> None:
    weight = of_spectrum("falling fast", 64, 288).float()
    assert Spectrum.of(weight, rank=20).matrix.dtype == torch.float32
    assert Spectrum.of(weight, rank=40).matrix.dtype == torch.float64
    assert Spectrum.of(1e-22 * weight).matrix.dtype == torch.float64
    assert Spectrum.of(weight.bfloat16()).matrix.dtype == torch.float32


def best_loss(energies: dict[str, Tensor], facts: Matrices, budget: int) -> float:
    """The least energy that must be lost to fit the budget, over all combinations of ranks: brute force."""
    choices = []
    for layer, e in energies.items():
        ranks = range(1, facts.largest_rank(layer) + 1)
        choices.append(
            [(facts.size(layer, r), float(e[r:].sum())) for r in ranks] + [(facts.full_size(layer), 0.0)]
        )
    fitting = (c for c in itertools.product(*choices) if sum(size for size, _ in c) <= budget)
    return min(sum(lost for _, lost in c) for c in fitting)


@pytest.mark.parametrize("seed", range(5))
def test_the_ranks_lose_little_more_energy_than_the_best_ones(seed: int) -> None:
    """What greedy steps cannot fill is less than one more singular value in the cheapest layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (16, 27), "b": (24, 144), "c": (20, 24), "d": (10, 20)}
    facts = Matrices(shapes, sum(m * n for m, n in shapes.values()))
    energies = {}
    for layer, (m, n) in shapes.items():
        decay = torch.arange(min(m, n)) * -(0.1 + 0.3 * torch.rand((), generator=generator))
        energies[layer] = (decay.exp() / decay.exp().sum()).double()
    for density in (0.8, 0.5, 0.3, 0.15):
        ranks = choose_ranks(energies, density, facts)
        size = sum(facts.size(layer, rank) for layer, rank in ranks.items())
        lost = sum(float(e[ranks[layer] :].sum()) for layer, e in energies.items())
        assert size <= density * facts.n_params < size + largest_rank_one(facts)
        unit = largest_rank_one(facts)
        assert best_loss(energies, facts, int(density * facts.n_params)) - 1e-9 <= lost
        assert lost <= best_loss(energies, facts, max(184, int(density * facts.n_params) - unit)) + 1e-9


def test_a_layer_that_does_not_shrink_stays_whole() -> None:
    model = lived_in(SmallResNet(in_channels=3))
    theta, _, realized = compressed(model, torch.randn(2, 3, 8, 8), 0.5)
    for name, rank in theta.plan["ranks"].items():
        layer = model.get_submodule(name)
        m, n = layer.weight.shape[0], layer.weight[0].numel()
        assert rank * (m + n) < m * n
        assert isinstance(realized.get_submodule(name), nn.Sequential)
    whole = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in theta.plan["ranks"]]
    assert whole and all(isinstance(realized.get_submodule(name), nn.Conv2d) for name in whole)


CONVOLUTIONS = [
    (nn.Conv1d(6, 8, 5, stride=2, padding=2), (6, 9)),
    (nn.Conv2d(6, 8, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (6, 9, 9)),
    (nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect", bias=False), (6, 9, 9)),
    (nn.Conv3d(6, 8, 2, padding=1), (6, 5, 5, 5)),
    (nn.Linear(16, 24), (3, 5, 16)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_every_kind_of_layer_is_realized_exactly(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    theta, masked, realized = compressed(nn.Sequential(layer, nn.ReLU()), x, 0.4)
    assert list(theta.plan["ranks"]) == ["0"] and isinstance(realized[0], nn.Sequential)
    assert error(run(realized, x), run(masked, x)) < 3e-6


class Odd(nn.Module):
    """A layer that is called, one whose weight is read, one that is shared, one with groups, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.shared = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.again = self.shared
        self.grouped = nn.Conv1d(16, 16, 1, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.linear(self.called(x), self.read.weight))
        x = self.grouped(self.again(self.shared(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.attention(x, x, x, need_weights=False)[0]


def test_only_layers_that_can_be_exchanged_are_factorized() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(2, 3, 16)
    theta, masked, realized = compressed(model, x, 0.0)
    assert theta.plan["ranks"] == {"called": 1}
    assert error(run(realized, x), run(masked, x)) < 1e-5
    assert compressed(SmallResNet(), torch.randn(1, 1, 8, 8), 0.0, LowRank(skip=["stem", "stages.*"]))[0].plan[
        "ranks"
    ] == {"classifier": 1}


def test_singular_values_of_zero_go_whatever_the_target() -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    with torch.no_grad():
        model.weight.copy_(torch.randn(20, 3) @ torch.randn(3, 30))
    theta, masked, _ = compressed(model, torch.randn(2, 30), 1.0)
    assert theta.plan["ranks"] == {"": 3}
    assert error(masked.weight.detach(), model.weight.detach()) < 1e-6
    with torch.no_grad():
        model.weight.zero_()
    theta, masked, _ = compressed(model, torch.randn(2, 30), 1.0)
    assert theta.plan["ranks"] == {"": 1} and not masked.weight.any()


def test_a_frozen_layer_becomes_frozen_factors() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[0].weight.requires_grad_(False)
    _, _, realized = compressed(model, torch.randn(2, 20), 0.3)
    assert [p.requires_grad for p in realized.parameters()] == [False, False, True, True, True, True]


def test_export_and_load(tmp_path: Path) -> None:
    """The files answer as the factorized model does, in a fresh process; a plan and the weights rebuild it."""
    model = lived_in(SmallResNet(in_channels=3))
    x = torch.randn(4, 3, 8, 8)
    theta, _, realized = compressed(model, x, 0.2)
    density = theta.kept / sum(p.numel() for p in model.parameters())
    written = export(realized, x[:1], tmp_path, Provenance("LowRank", theta.plan, density, "test"))
    assert not written.refused
    assert written.artifacts[2].size_bytes < 4.6 * theta.kept + 6000
    loaded = bundle.load(tmp_path, SmallResNet(in_channels=3))
    assert torch.equal(run(loaded, x), run(realized.eval(), x))


def test_settings_and_models_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_rank=0; every layer must keep at least rank 1"):
        LowRank(min_rank=0)
    with pytest.raises(ValueError, match="LowRank finds no layer in this model that two factors would be smaller"):
        LowRank().analyze(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.zeros(1, 2))
    model = copy.deepcopy(SmallResNet())
    with pytest.raises(ValueError, match="skip names 'nothing', which matches no module"):
        LowRank(skip="nothing").analyze(model, torch.zeros(1, 1, 8, 8))
