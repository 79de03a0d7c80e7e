from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.models import SmallResNet
from autocompress.scheme import Evidence, Weights
from autocompress.schemes import StructPrune
from autocompress.schemes.criteria import ENTRY_CRITERIA, SHORT_LOOK, entry_scores, lamp, observe_entries
from autocompress.schemes.feature_maps import watched
from autocompress.schemes.groups import Slices
from autocompress.schemes.importance import CHANNEL_CRITERIA, Normalization, can_rate, channel_scores, normalized
from autocompress.schemes.roles import Roles
from autocompress.schemes.struct import Structure
from autocompress.testing import fingerprint, lived_in

X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(5))
Y = torch.arange(12) % 4


def batches(size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


def evidence_of(model: nn.Module, size: int = 4, **more: Weights) -> Evidence:
    return Evidence(model, lambda: batches(size), nn.functional.cross_entropy, **more)


def network() -> nn.Module:
    """A convolution with BatchNorm and Dropout, hidden neurons and a classifier."""
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return lived_in(nn.Sequential(*layers, nn.Dropout(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 4)))


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Single weights


def scores_of(criterion: str, model: nn.Module, names: list[str], size: int = 4) -> Weights:
    observed = observe_entries(criterion, evidence_of(model, size), names)
    return entry_scores(criterion, weights_of(model), names, observed)


def test_magnitudes() -> None:
    weights = {"a": torch.tensor([[3.0, -4.0], [0.0, 0.5]])}
    assert entry_scores("l1", weights, ["a"])["a"].tolist() == [[3.0, 4.0], [0.0, 0.5]]
    assert entry_scores("l2", weights, ["a"])["a"].tolist() == [[9.0, 16.0], [0.0, 0.25]]


def test_lamp_by_hand() -> None:
    # 1 of 1 + 4 + 9; 4 of 4 + 9; 9 of 9: the largest of each layer scores 1.
    scores = entry_scores("lamp", {"a": torch.tensor([2.0, -1.0, 3.0]), "b": torch.tensor([0.1])}, ["a", "b"])
    torch.testing.assert_close(scores["a"], torch.tensor([4 / 13, 1 / 14, 1.0]))
    assert scores["b"].tolist() == [1.0]
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def linear_gradients() -> tuple[nn.Linear, list[Tensor], Evidence]:
    """A linear layer under the squared error, and its gradients by the closed form 2/n Σ (Wx − y) xᵀ."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False)
    data = [(torch.randn(4, 5), torch.randn(4)) for _ in range(3)]
    gradients = [2 / 4 * (x @ model.weight.detach()[0] - y) @ x for x, y in data]

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs[:, 0] - y).square().mean()

    return model, gradients, Evidence(model, lambda: data, loss)


def test_taylor_is_the_squared_product_of_weight_and_gradient() -> None:
    model, gradients, evidence = linear_gradients()
    scores = entry_scores("taylor", weights_of(model), ["weight"], observe_entries("taylor", evidence, ["weight"]))
    expected = (sum(gradients) / 3 * model.weight.detach()[0]).square()
    torch.testing.assert_close(scores["weight"][0], expected)


def test_obd_is_the_squared_weight_times_the_mean_squared_gradient_of_all_batches() -> None:
    model, gradients, evidence = linear_gradients()
    scores = entry_scores("obd", weights_of(model), ["weight"], observe_entries("obd", evidence, ["weight"]))
    fisher = sum(g.square() for g in gradients) / 3
    torch.testing.assert_close(scores["weight"][0], model.weight.detach()[0].square() * fisher)


def test_obd_of_single_samples_is_the_empirical_fisher_of_a_logistic_regression() -> None:
    """The gradient of −log p(y) is (p − e_y) xᵀ."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3, bias=False), torch.randn(7, 6), torch.arange(7) % 3
    evidence = Evidence(model, lambda: zip(x.split(1), y.split(1), strict=True), nn.functional.cross_entropy)
    error = torch.softmax(model(x).detach(), 1) - nn.functional.one_hot(y, 3)
    fisher = (error.square().T @ x.square()) / 7
    observed = observe_entries("obd", evidence, ["weight"])
    assert observed is not None
    torch.testing.assert_close(observed["weight"], fisher)


@pytest.mark.parametrize(("criterion", "power"), [("taylor", 1), ("obd", 2)])
def test_what_training_gathered_of_gradients_is_not_measured_again(criterion: str, power: int) -> None:
    model = network()
    gathered = {name: torch.rand_like(w) for name, w in weights_of(model).items()}

    def no_batches() -> list[tuple[Tensor, Tensor]]:
        raise AssertionError("there was no need to look at data")

    evidence = Evidence(
        model, no_batches, nn.functional.cross_entropy, gradient_moments={power: gathered}.__getitem__
    )
    scores = entry_scores(
        criterion, weights_of(model), ["6.weight"], observe_entries(criterion, evidence, ["6.weight"])
    )
    w, seen = weights_of(model)["6.weight"], gathered["6.weight"]
    assert torch.equal(scores["6.weight"], (w * seen).square() if power == 1 else w.square() * seen)


def test_a_look_that_training_makes_up_for_is_short() -> None:
    model, served = network(), list[int]()

    def counted() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(2):
            served.append(len(batch[0]))
            yield batch

    evidence = Evidence(model, counted, nn.functional.cross_entropy)
    for provisional, n in ((False, 6), (True, SHORT_LOOK)):
        served.clear()
        observe_entries("obd", replace(evidence, provisional=provisional), ["6.weight"])
        assert len(served) == n


def test_obd_measures_what_training_did_not_gather() -> None:
    model = network()
    frozen = evidence_of(model, gradient_moments=lambda power: {"6.weight": torch.rand(10, 24)})
    observed = observe_entries("obd", frozen, ["6.weight", "8.weight"])
    assert observed is not None and observed.keys() == {"6.weight", "8.weight"}


def test_random_scores_are_the_same_each_time_and_differ_between_layers() -> None:
    weights = {"a": torch.ones(50, 4), "b": torch.ones(50, 4)}
    first, second = (entry_scores("random", weights, ["a", "b"]) for _ in range(2))
    assert torch.equal(first["a"], second["a"]) and not torch.equal(first["a"], first["b"])
    assert first["a"].unique().numel() > 190


@pytest.mark.parametrize("criterion", ENTRY_CRITERIA)
def test_entry_scores_have_the_weights_shapes_and_are_not_negative(criterion: str) -> None:
    model = network()
    names = ["0.weight", "6.weight", "1.weight"]
    scores = scores_of(criterion, model, names)
    assert list(scores) == names
    for name in names:
        assert scores[name].shape == model.get_parameter(name).shape
        assert (scores[name] >= 0).all() and scores[name].any()


@pytest.mark.parametrize("criterion", ["taylor", "obd"])
def test_what_looks_at_data_says_so_when_there_was_none(criterion: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"criterion='{criterion}' looks at data and has seen none"):
        entry_scores(criterion, weights_of(model), ["0.weight"])
    empty = Evidence(model, lambda: [], nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="no batches"):
        observe_entries(criterion, empty, ["0.weight"])


@pytest.mark.parametrize("criterion", ENTRY_CRITERIA)
def test_observing_leaves_everything_as_it_was(criterion: str) -> None:
    model = network()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.get_parameter("0.weight").requires_grad_(False)
    before, rng = fingerprint(model), torch.get_rng_state()
    with torch.no_grad():  # as the C step is called
        observed = observe_entries(criterion, evidence_of(model), ["0.weight", "6.weight"])
    assert fingerprint(model) == before
    assert all(p.grad is not None and p.grad.eq(1).all() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    if observed is not None:  # the frozen weight has a gradient too
        assert all(not t.requires_grad and t.any() for t in observed.values())


# Channels


def structure_of(criterion: str, model: nn.Module, size: int = 4) -> Structure:
    scheme = StructPrune(criterion=criterion)  # type: ignore[arg-type]  # one of them
    return scheme.observe(evidence_of(model, size), scheme.analyze(model, X[:1]))


def channels(criterion: str, model: nn.Module, size: int = 4) -> dict[str, Tensor]:
    """The scores by the name of the group's root."""
    facts = structure_of(criterion, model, size)
    scores = channel_scores(criterion, facts.groups, weights_of(model), facts.roles, facts.observed)
    return dict(zip([g.root for g in facts.groups], scores.split([g.width for g in facts.groups]), strict=True))


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "obd"])
def test_the_score_of_a_channel_is_the_sum_over_all_that_goes_with_it(criterion: str) -> None:
    model = network()
    found = channels(criterion, model)
    e = scores_of(criterion, model, list(weights_of(model)))
    of_filters = e["0.weight"].sum((1, 2, 3)) + e["0.bias"] + e["1.weight"] + e["1.bias"]
    of_filters += e["6.weight"].view(10, 6, 4).sum((0, 2))  # four positions of a channel are flattened
    torch.testing.assert_close(found["0"], of_filters)
    torch.testing.assert_close(found["6"], e["6.weight"].sum(1) + e["6.bias"] + e["8.weight"].sum(0))


def test_bn_scale_is_the_magnitude_of_the_scales() -> None:
    model = residual()
    found = channels("bn_scale", model)
    scales = [model.get_parameter(f"{name}.weight").detach().abs() for name in ("stem.1", "stages.0.bn2")]
    torch.testing.assert_close(found["stem.0"], (scales[0] + scales[1]) / 2)


def test_fpgm_of_many_filters_counts_each_pair_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 150, 3), nn.ReLU(), nn.Conv2d(150, 4, 1), nn.Flatten(2))
    filters = model[0].weight.detach().flatten(1).double()
    expected = (filters[:, None] - filters).norm(dim=2).sum(1)
    torch.testing.assert_close(channels("fpgm", model)["0"].double(), expected, rtol=1e-4, atol=1e-4)


def test_fpgm_is_the_distance_from_all_other_filters() -> None:
    model = residual()
    found = channels("fpgm", model)["stem.0"]
    expected = torch.zeros(16)
    for name in ("stem.0", "stages.0.conv2"):
        w = model.get_parameter(f"{name}.weight").detach()
        expected += torch.tensor([sum(float((w[i] - w[j]).norm()) for j in range(16)) for i in range(16)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def inputs_of(model: nn.Module, layer: str, x: Tensor = X) -> Tensor:
    """What a layer is given, by a run of its own."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    with torch.no_grad():
        model.eval()(x)
    hook.remove()
    return seen[0]


def test_activation_is_the_mean_magnitude_that_the_next_layers_get() -> None:
    model = network()
    found = channels("activation", model)
    flat = inputs_of(model, "6").view(12, 6, 4)
    torch.testing.assert_close(found["0"], flat.abs().mean((0, 2)))
    torch.testing.assert_close(found["6"], inputs_of(model, "8").abs().mean(0))


def test_hrank_is_the_mean_rank_of_the_maps() -> None:
    model = residual()
    with torch.no_grad():
        model.stages[0].bn1.bias[3] = -100.0  # behind the ReLU nothing is left
    found = channels("hrank", model)["stages.0.conv1"]
    maps = inputs_of(model, "stages.0.conv2")
    ranks = [[int(np.linalg.matrix_rank(sample[c].numpy())) for sample in maps] for c in range(16)]
    torch.testing.assert_close(found, torch.tensor(ranks, dtype=torch.float).mean(1))
    assert found[3] == 0 and found.sort().values[1] > 0


def test_beta_rank_by_its_equations() -> None:
    """Equations 2, 4 and 5 of the paper for one convolution and one batch, in plain loops."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        outputs = conv(X)

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5

    at_inputs = [deviation(X[:, c, a, b].tolist()) for c in range(3) for a in range(8) for b in range(8)]
    sigma_in = sum(at_inputs) / len(at_inputs)
    expected = []
    for k in range(4):
        at_outputs = [deviation(outputs[:, k, a, b].tolist()) for a in range(6) for b in range(6)]
        sigma_out = sum(at_outputs) / len(at_outputs)
        expected.append(float(conv.weight[k].detach().abs().sum()) * sigma_out / sigma_in)
    torch.testing.assert_close(channels("beta_rank", model, size=12)["0"], torch.tensor(expected))


def test_beta_rank_of_neurons_is_that_of_filters_with_one_position() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 4))
    flat, w = X.flatten(1), model.get_parameter("1.weight").detach()
    outputs = flat @ w.T
    expected = w.abs().sum(1) * outputs.std(0, correction=0) / flat.std(0, correction=0).mean()
    torch.testing.assert_close(channels("beta_rank", model, size=12)["1"], expected)


def test_random_scores_of_channels_are_fixed_and_differ_between_groups() -> None:
    first, second = channels("random", residual()), channels("random", residual())
    assert all(torch.equal(first[root], scores) for root, scores in second.items())
    assert not torch.equal(first["stem.0"], first["stages.0.conv1"])


@pytest.mark.parametrize(
    ("by", "divided_by"),
    [("none", (1, 1)), ("mean", (4, 9)), ("sqrt", (2, 3)), ("parameters", (3 + 1 + 3, 4 + 1 + 5))],
)
def test_normalized_scores_by_hand(by: Normalization, divided_by: tuple[float, float]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    groups = StructPrune().analyze(model, torch.rand(1, 3)).groups
    assert [group.width for group in groups] == [4, 3]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    first, second = torch.tensor([1.0, 3.0, 4.0, 8.0]), torch.tensor([6.0, 9.0, 12.0])
    found = normalized(by, torch.cat([first, second]), groups, shapes)
    torch.testing.assert_close(found, torch.cat([first / divided_by[0], second / divided_by[1]]))
    assert torch.equal(normalized(by, torch.zeros(7), groups, shapes), torch.zeros(7))


def residual() -> SmallResNet:
    model = lived_in(SmallResNet(in_channels=3, classes=4))
    assert isinstance(model, SmallResNet)
    return model


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
def test_each_criterion_ranks_channels_and_removes_the_lowest(criterion: str) -> None:
    """Whatever it looks at: the model is as it was, and what is removed scores less than what is kept."""
    model = residual()
    scheme = StructPrune(criterion=criterion, normalize="none")  # type: ignore[arg-type]  # one of them
    facts = scheme.analyze(model, X[:1])
    before, rng = fingerprint(model), torch.get_rng_state()
    with torch.no_grad():
        facts = scheme.observe(evidence_of(model), facts)
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_hooks for module in model.modules())
    weights = weights_of(model)
    theta = scheme.pi(weights, 0.4, facts)
    name = "l2" if criterion == "lamp" else criterion
    scores = channel_scores(name, facts.groups, weights, facts.roles, facts.observed)
    assert scores.shape == (sum(g.width for g in facts.groups),) and (scores >= 0).all() and scores.std() > 0
    for group, score in zip(facts.groups, scores.split([g.width for g in facts.groups]), strict=True):
        gone = theta.plan["removed"][group.root]
        kept = [c for c in range(group.width) if c not in gone]
        assert not gone or score[gone].max() <= score[kept].min()


@pytest.mark.parametrize("criterion", ["taylor", "obd", "activation", "hrank", "beta_rank"])
def test_a_channel_criterion_that_looks_at_data_says_so_when_there_was_none(criterion: str) -> None:
    model = residual()
    scheme = StructPrune(criterion=criterion)  # type: ignore[arg-type]  # one of them
    facts = scheme.analyze(model, X[:1])
    with pytest.raises(ValueError, match=f"criterion='{criterion}' looks at data and has seen none"):
        scheme.pi(weights_of(model), 0.5, facts)
    with pytest.raises(ValueError, match="no batches"):
        scheme.observe(Evidence(model, lambda: [], nn.functional.cross_entropy), facts)


@pytest.mark.parametrize(("criterion", "whole"), [("bn_scale", "6"), ("hrank", "6")])
def test_layers_that_a_criterion_cannot_rate_are_left_whole_and_named(criterion: str, whole: str) -> None:
    model = network()
    scheme = StructPrune(criterion=criterion)  # type: ignore[arg-type]  # one of them
    with pytest.warns(
        UserWarning, match=rf"left at full width, as criterion='{criterion}' cannot rate.*: {whole}$"
    ):
        facts = scheme.analyze(model, X[:1])
    assert [group.root for group in facts.groups] == ["0"]
    plain = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    with pytest.raises(
        ValueError, match=f"^StructPrune finds no channels .*criterion='{criterion}' cannot .*: 0$"
    ):
        scheme.analyze(plain, torch.randn(1, 6))


def test_criteria_follow_the_shifted_weights() -> None:
    """The C step projects w − λ/μ, not the weights that were observed."""
    model = residual()
    for criterion in ("taylor", "obd", "beta_rank", "fpgm", "bn_scale"):
        facts = structure_of(criterion, model)
        shifted = {name: w * (1 + torch.rand_like(w)) for name, w in weights_of(model).items()}
        scores = [
            channel_scores(criterion, facts.groups, weights, facts.roles, facts.observed)
            for weights in (weights_of(model), shifted)
        ]
        assert not torch.allclose(*scores), criterion


def test_what_is_never_called_by_itself_is_not_watched() -> None:
    """Attention multiplies with its output projection without calling the layer: a hook on it sees nothing."""
    roles = Roles.of(nn.Sequential(nn.MultiheadAttention(10, 2), nn.Linear(10, 4)))
    group = next(g for g in structure_of("l2", network()).groups if g.width == 10)
    slices = [Slices(name, 0, torch.arange(10), torch.arange(10)) for name in ("0.out_proj.weight", "1.weight")]
    for criterion in ("activation", "beta_rank"):
        assert not can_rate(criterion, replace(group, slices=(slices[0],)), roles)
        assert watched(criterion, replace(group, slices=tuple(slices)), roles) == [slices[1]]


class WithAuxiliaryHead(nn.Module):
    """A network whose second head is used in training alone; its outputs are the mean of both then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.auxiliary = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        # As by those who tie weights: the layer is not called, and yet it is used in eval mode.
        out = nn.functional.linear(self.body(maps).mean((2, 3)), self.head.weight, self.head.bias)
        return (out + self.auxiliary(maps).mean((2, 3))) / 2 if self.training else out


@pytest.mark.parametrize("criterion", ["activation", "hrank", "beta_rank"])
def test_channels_that_are_there_in_training_alone_go_first_and_are_named(criterion: str) -> None:
    torch.manual_seed(0)
    model = WithAuxiliaryHead()
    scheme = StructPrune(criterion=criterion, align=1, normalize="mean")  # type: ignore[arg-type]  # one of them
    with pytest.warns(
        UserWarning, match=r"channels of auxiliary\.0, which the model uses in training alone, go f"
    ):
        facts = scheme.analyze(model, X[:1])
    assert model.training
    facts = scheme.observe(evidence_of(model), facts)
    widths = [group.width for group in facts.groups]
    scores = channel_scores(criterion, facts.groups, weights_of(model), facts.roles, facts.observed).split(widths)
    by_root = dict(zip((group.root for group in facts.groups), scores, strict=True))
    assert by_root.pop("auxiliary.0").tolist() == [0.0] * 6
    assert sorted(by_root) == ["body.0", "stem.0"]
    assert all(score.isfinite().all() and score.max() > 0 for score in by_root.values())
    removed = scheme.pi(weights_of(model), 0.8, facts).plan["removed"]
    assert {root: len(gone) for root, gone in removed.items() if gone} == {"auxiliary.0": 4}
