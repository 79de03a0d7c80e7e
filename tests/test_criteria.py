import pytest
import torch
from torch import Tensor, nn

from autocompress.scheme import Evidence, Weights
from autocompress.schemes.criteria import ENTRY_CRITERIA, entry_scores, lamp, observe_entries
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


def test_obd_takes_the_squared_gradients_that_training_gathered() -> None:
    model = network()
    gathered = {name: torch.rand_like(w) for name, w in weights_of(model).items()}

    def no_batches() -> list[tuple[Tensor, Tensor]]:
        raise AssertionError("there was no need to look at data")

    evidence = Evidence(model, no_batches, nn.functional.cross_entropy, squared_gradients=gathered)
    scores = entry_scores("obd", weights_of(model), ["6.weight"], observe_entries("obd", evidence, ["6.weight"]))
    assert torch.equal(scores["6.weight"], weights_of(model)["6.weight"].square() * gathered["6.weight"])


def test_obd_measures_what_training_did_not_gather() -> None:
    model = network()
    frozen = evidence_of(model, squared_gradients={"6.weight": torch.rand(10, 24)})
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
