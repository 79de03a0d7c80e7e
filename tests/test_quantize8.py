import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autocompress.export import export
from autocompress.formats import weights
from autocompress.formats.bundle import Provenance, load
from autocompress.formats.onnx_export import write_onnx
from autocompress.models import SmallResNet
from autocompress.recovery import make_recovery
from autocompress.scheme import Compose, Evidence, Scheme, Theta, describe, parse_scheme
from autocompress.schemes import PruneQuantize8, Quantize8, StructPruneQuantize8
from autocompress.schemes.grid import dequantize_weight, quantize_weight
from autocompress.schemes.integer_graph import find_layers, find_points, with_integers
from autocompress.schemes.quantize8 import Integers, steps_between
from autocompress.schemes.traced import trace
from autocompress.testing import (
    SchemeConformance,
    concatenated,
    depthwise,
    find_facts,
    flattened,
    gated,
    lived_in,
    masked_model,
    residual,
    run,
)
from autocompress.trial import TrialSpec, run_trial


class InIntegers(SchemeConformance):
    """What rounding to a grid makes different: entries become zero, and only biases can be trained further."""

    __test__ = False
    trials = 10  # each of them traces the network anew

    def test_pi_is_idempotent(self, model_name: str, density: float) -> None:
        scheme, case = self.make_scheme(), self.case(model_name)
        density = max(density, scheme.lowest_density(case.facts))
        theta = scheme.pi(case.weights, density, case.facts)
        assert_same(scheme.pi(scheme.delta(theta), density, case.facts), theta, values=True)

    def test_training_on_the_support_keeps_it(self, model_name: str, density: float) -> None:
        scheme, case = self.make_scheme(), self.case(model_name)
        density = max(density, scheme.lowest_density(case.facts))
        theta = scheme.pi(case.weights, density, case.facts)
        moved = {name: w * (1 + torch.rand(w.shape)) for name, w in scheme.delta(theta).items()}
        assert_same(scheme.pi(moved, density, case.facts), theta)

    def test_delta_is_w_on_the_support_and_zero_off_it(self, model_name: str) -> None:
        scheme, case, theta = self.projected(model_name)
        for name, value in scheme.delta(theta).items():
            w = case.weights[name]
            support = theta.support.get(name, torch.ones_like(w, dtype=torch.bool))
            # Half a step, or what is clipped where that saves more than it costs.
            reach = float(w.abs().max()) / 20 if w.dim() > 1 else 0.0
            assert (value - w)[support].abs().max() <= reach
            assert not value[~support].any()

    def test_kept_counts_the_realized_model(self, model_name: str) -> None:
        """Zeros on the grid are kept like any other integer; BatchNorm's parameters are in the biases."""
        scheme, case, theta = self.projected(model_name)
        realized = scheme.realize(masked_model(scheme, case.model, theta), theta, case.facts)
        nonzero = sum(int(p.count_nonzero()) for p in realized.parameters() if p.dim() > 1)
        matrices = [theta.support.get(name, torch.ones_like(w)) for name, w in case.weights.items() if w.dim() > 1]
        others = theta.kept - sum(int(kept.count_nonzero()) for kept in matrices)
        assert 0.9 * (theta.kept - others) <= nonzero <= theta.kept - others

    def test_realized_takes_over_mode_and_what_is_trainable(self, model_name: str) -> None:
        scheme, case, theta = self.projected(model_name)
        masked = masked_model(scheme, case.model, theta)
        for bias in (p for name, p in masked.named_parameters() if name.endswith("bias")):
            bias.requires_grad_(False)
        realized = scheme.realize(masked.train(), theta, case.facts)
        assert all(module.training for module in realized.modules())
        assert not any(p.requires_grad for p in realized.parameters())
        assert not any(module.training for module in scheme.realize(masked.eval(), theta, case.facts).modules())

    def test_realized_trains(self, model_name: str) -> None:
        """The biases can, from the last layer's on: rounding has no gradient."""
        _, realized, case = self.realized(model_name)
        nn.functional.cross_entropy(realized(case.x), torch.arange(len(case.x)) % 5).backward()
        *_, bias = (p for p in realized.parameters() if p.dim() == 1)
        assert bias.grad is not None and bias.grad.any()


def assert_same(actual: Theta, expected: Theta, values: bool = False) -> None:
    """Fails unless two C steps agree; which zeros are called kept does not matter."""
    assert (actual.plan, actual.kept, actual.drawn) == (expected.plan, expected.kept, expected.drawn)
    for name, value in expected.values.items():
        support = expected.support.get(name, torch.ones_like(value, dtype=torch.bool))
        again = actual.support.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(again & (value != 0), support & (value != 0)), name
        assert not values or torch.equal(actual.values[name], value), name


class TestQuantize8(InIntegers):
    models: ClassVar = {make.__name__: make for make in (residual, concatenated, depthwise, gated)}

    def make_scheme(self) -> Scheme:
        return Quantize8()


class TestStructPruneQuantize8(InIntegers):
    densities = (0.5, 0.1)
    models: ClassVar = {"depthwise": depthwise, "flattened": flattened}

    def make_scheme(self) -> Scheme:
        return StructPruneQuantize8()

    def unit_size(self, case: object) -> int:
        return 1000

    test_kept_counts_the_realized_model = None  # type: ignore[assignment]  # zeros of removed channels are gone


class TestPruneQuantize8(InIntegers):
    densities = (0.5, 0.1)
    models: ClassVar = {"residual": residual}

    def make_scheme(self) -> Scheme:
        return PruneQuantize8()


# The grid


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
    outlier=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 2**16),
)
def test_a_grid_is_nearly_the_best_and_projecting_twice_is_projecting_once(
    bits: int, spread: float, outlier: float, seed: int
) -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * spread
    w[0] = 0
    w[1, 0] *= outlier
    q, scale = quantize_weight(w, 0, bits)
    q_max = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8 and int(q.abs().max()) == q_max and not q[0].any()
    values = dequantize_weight(q, scale, 0)
    again, scale_again = quantize_weight(values, 0, bits)
    assert torch.equal(again, q) and torch.equal(dequantize_weight(again, scale_again, 0), values)
    error = (w - values).square().sum(1)
    clips = w.abs().amax(1).clamp_min(1e-30) / q_max * torch.linspace(1, 0.02, 800)[:, None]
    steps = (w / clips[..., None]).round().clamp(-q_max, q_max) * clips[..., None]
    best = (w - steps).square().sum(2).amin(0)
    assert (error <= 1.25 * best + 1e-30).all()
    inside = w.abs() <= q_max * scale[:, None]
    # Off by half a step at most; the division is rounded, too.
    assert ((w - values).abs() <= 0.5001 * scale[:, None])[inside].all()


def test_values_on_a_grid_stay() -> None:
    w = torch.tensor([[-127.0, 3.0, 0.0, 64.0], [0.5, -0.25, 0.0, 31.75]]) / 128
    q, scale = quantize_weight(w, 0, 8)
    assert q.tolist() == [[-127, 3, 0, 64], [2, -1, 0, 127]]
    assert scale.tolist() == [1 / 128, 1 / 512]


def test_steps_hold_the_range_and_zero() -> None:
    for low, high in ((0.0, 6.0), (-1.0, 2.0), (-3.0, 0.0), (0.0, 0.0)):
        scale, zero = steps_between(low, high)
        assert 0 <= zero <= 255
        assert (0 - zero) * scale <= low + scale / 2 and (255 - zero) * scale >= high - scale / 2


# Layers


def made(
    model: nn.Module, x: Tensor, scheme: Scheme | None = None, density: float = 1.0
) -> tuple[nn.Module, nn.Module, Theta]:
    """The masked model, the realized one and θ."""
    scheme = scheme or Quantize8()
    facts = find_facts(scheme, model, x)
    theta = scheme.pi({name: p.detach() for name, p in model.named_parameters()}, density, facts)
    masked = masked_model(scheme, model, theta)
    return masked, scheme.realize(masked, theta, facts), theta


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,), 0),
    "linear in a sequence": (lambda: nn.Linear(6, 5), (3, 6), 0),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9), 0),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (4, 9, 9), 0),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (4, 5, 5, 5), 0),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 9, 9), 0),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 9, 9), 0),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 9), 1),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 9, 9), 1),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (4, 5, 5, 5), 1),
    "one channel": (lambda: nn.ConvTranspose2d(4, 1, 3), (4, 9, 9), 1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_has_a_scale_for_each_output_channel(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape, axis = LAYERS[kind]
    layer = make()
    assert isinstance(layer.weight, nn.Parameter)
    channels = layer.weight.shape[axis]
    gains = torch.logspace(-3, 3, channels).reshape([-1 if d == axis else 1 for d in range(layer.weight.dim())])
    with torch.no_grad():
        layer.weight *= gains  # with one scale for all of them, the small channels would be lost
    model, x = nn.Sequential(layer, nn.Flatten()).eval(), torch.randn(16, *shape)
    masked, realized, theta = made(model, x)
    moved = (theta.values["0.weight"] - layer.weight).abs().movedim(axis, 0).flatten(1).amax(1)
    largest = layer.weight.abs().movedim(axis, 0).flatten(1).amax(1)
    assert (moved <= largest / 20).all()  # the largest may be clipped
    assert realized.get_parameter("0.weight").dtype == torch.int8
    assert error(run(realized, x), run(masked, x)) < 0.02
    write_onnx(realized, torch.zeros_like(x[:2]), tmp_path / "model.onnx")
    assert error(run_onnx(tmp_path / "model.onnx", x), run(realized, x)) < 1e-5


def run_onnx(path: Path, x: Tensor, *, optimized: Path | None = None) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimized graph is for this machine
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


class Tied(nn.Module):
    """One weight that two layers read, and one that a layer and something else read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.other(x) + self.other.weight.sum()


def test_shared_weights_are_stored_once_and_those_that_something_else_reads_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(16, 6)
    with pytest.warns(UserWarning, match=r"left in float32 \(something else reads them too.*\): other.weight$"):
        masked, realized, theta = made(model, x)
    assert torch.equal(theta.values["other.weight"], model.other.weight)
    assert error(run(realized, x), run(masked, x)) < 0.02
    assert [w.shape for w in realized.state_dict().values() if w.dtype == torch.int8] == [(6, 6)]
    write_onnx(realized, torch.zeros(2, 6), tmp_path / "model.onnx")
    assert error(run_onnx(tmp_path / "model.onnx", x), run(realized, x)) < 1e-5


class Shifted(nn.Module):
    """A layer whose bias is a part of another parameter, as the projections of attention are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shifts = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(12))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        shift, _ = self.shifts.chunk(2)
        return self.out(torch.relu(nn.functional.linear(x, self.weight, shift)))


def test_a_layer_whose_bias_is_computed_stays_in_float32() -> None:
    torch.manual_seed(0)
    model, x = Shifted().eval(), torch.randn(16, 6)
    with pytest.warns(UserWarning, match=r"left in float32 \(.*their bias is computed.*\): weight$"):
        masked, realized, _ = made(model, x)
    assert error(run(realized, x), run(masked, x)) < 0.05


def test_grouped_transposed_convolutions_stay_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten()).eval()
    with pytest.warns(UserWarning, match="left in float32.*: 1.weight$"):
        facts = Quantize8().analyze(model, torch.zeros(1, 3, 4, 4))
    assert facts.axes == {"0.weight": 0}


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Quantize8 finds no linear or convolutional weights in this model"):
        Quantize8().analyze(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).eval(), torch.zeros(1, 3))


def test_a_model_that_cannot_be_traced_is_refused_in_one_line() -> None:
    class Branches(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(
        ValueError, match=r"^Quantize8 finds no int8 form of this model: torch.export cannot"
    ) as caught:
        Quantize8().analyze(Branches(3, 3), torch.zeros(1, 3))
    assert "\n" not in str(caught.value)

    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(len(x), 3)

    with pytest.raises(ValueError, match=r"makes a constant of the batch size, as len\(x\) does"):
        Quantize8().analyze(Fixed(3, 3), torch.zeros(1, 3))


def test_without_data_there_is_nothing_to_realize() -> None:
    model = nn.Linear(3, 3)
    facts = Quantize8().analyze(model, torch.zeros(1, 3))
    theta = Quantize8().pi(dict(model.named_parameters()), 1.0, facts)
    with pytest.raises(ValueError, match="must see training data before it realizes a model"):
        Quantize8().realize(model, theta, facts)


@pytest.mark.parametrize("bits", [1, 9, 4.5, "8"])
def test_bits_are_between_2_and_8(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits=.*; a weight has 2 to 8 bits"):
        Quantize8(bits=bits)


def test_bits_are_part_of_the_name() -> None:
    assert describe(parse_scheme("StructPrune+Quantize8(bits=4)")) == "StructPrune+Quantize8(bits=4)"
    assert describe(StructPruneQuantize8()) == "StructPrune+Quantize8"


# The network


def folded(masked: nn.Module, x: Tensor) -> nn.Module:
    """A network whose weights are on their grids, with BatchNorm folded and nothing else rounded."""
    traced = trace(masked, x)
    points = find_points(traced, find_layers(traced)[0])
    realized = with_integers(traced, [(1e-5, 0)] * len(points), 8)
    for node in realized.graph.nodes:
        if node.target == torch.ops.aten.round.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target == torch.ops.aten.clamp.default:
            node.args = (node.args[0], None, torch.inf)
    realized.recompile()
    return realized


@pytest.mark.parametrize("make", [residual, depthwise, lambda: SmallResNet(in_channels=3, classes=5)])
def test_batchnorm_is_folded_exactly(make: Callable[[], nn.Module]) -> None:
    model, x = lived_in(make()), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight[::2] *= -1  # a negative factor turns the integers' signs
    masked, realized, _ = made(model, x)
    assert not any("batch_norm" in str(node.target) for node in realized.graph.nodes)
    assert not any("running" in name for name in realized.state_dict())
    assert error(run(folded(masked, x), x), run(masked, x)) < 1e-5


def test_scale_and_shift_that_are_frozen_or_absent() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, bias=True)
    model = nn.Sequential(conv, nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    x = torch.randn(32, 3, 8, 8)
    model.train()(x)
    model.eval()
    conv.bias.requires_grad_(False)
    masked, realized, _ = made(model, x)
    assert error(run(realized, x), run(masked, x)) < 0.05
    assert [p.requires_grad for name, p in realized.named_parameters() if "bias" in name] == [False, True]


def test_a_dead_channel_keeps_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[2] *= 1e-12
        model[0].bias.fill_(0.7)
    x = torch.randn(8, 3, 8, 8)
    masked, realized, _ = made(model, x)
    assert torch.allclose(realized.get_parameter("0.bias"), torch.full((4,), 0.7), atol=1e-3)
    assert error(run(realized, x), run(masked, x)) < 0.05


class Overwrites(nn.Module):
    """Writes into tensors that are read again later, once through a view."""

    def __init__(self, through_a_view: bool) -> None:
        super().__init__()
        self.conv, self.head, self.through_a_view = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5), through_a_view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y.relu_()
        if self.through_a_view:
            z[:, :2].add_(1.0)
        return self.head((y + z).mean((2, 3)))


@pytest.mark.parametrize("through_a_view", [False, True])
def test_operators_that_overwrite(through_a_view: bool) -> None:
    model, x = Overwrites(through_a_view).eval(), torch.randn(8, 3, 8, 8)
    masked, realized, _ = made(model, x)
    assert error(run(realized, x), run(masked, x)) < 0.03


def test_few_bits_use_few_levels_and_are_drawn() -> None:
    model, x = lived_in(residual()), torch.randn(8, 3, 8, 8)
    _, realized, theta = made(model, x, Quantize8(bits=3))
    levels = {int(q) for p in realized.parameters() if p.dtype == torch.int8 for q in p.unique()}
    assert levels == set(range(-3, 4))
    assert theta.drawn == {name for name, p in model.named_parameters() if p.dim() > 1}
    assert made(model, x)[2].drawn == frozenset()


def test_ranges_are_those_of_all_batches() -> None:
    model = nn.Linear(2, 2)
    facts = Quantize8().analyze(model, torch.zeros(1, 2))
    batches = [(torch.tensor([[1.0, -2.0]]), torch.zeros(1)), (torch.tensor([[3.0, 0.0]]), torch.zeros(1))]
    seen = Quantize8().observe(Evidence(model, lambda: batches, nn.functional.cross_entropy), facts)
    assert isinstance(seen, Integers) and seen.steps == (steps_between(-2.0, 3.0),)


# What ships


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module, Tensor, Theta, Path]:
    """A residual network, its realized form, a batch, θ, and the folder that it was exported to."""
    torch.manual_seed(0)
    model = lived_in(SmallResNet(in_channels=3, classes=5))
    x = torch.randn(64, 3, 8, 8)
    _, realized, theta = made(model, x)
    folder = tmp_path_factory.mktemp("best")
    exported = export(realized, x[:1], folder, Provenance("Quantize8", theta.plan, 1.0, "test"))
    assert exported.refused == {}
    return model, realized, x, theta, folder


def test_onnx_runtime_computes_in_integers_what_the_module_computes(
    shipped: tuple[nn.Module, nn.Module, Tensor, Theta, Path], tmp_path: Path
) -> None:
    _, realized, x, _, folder = shipped
    logits = run_onnx(folder / "model.onnx", x, optimized=tmp_path / "optimized.onnx")
    expected = run(realized, x)
    assert error(logits, expected) < 0.02
    assert float((logits.argmax(1) == expected.argmax(1)).float().mean()) >= 0.99
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 9 and kinds["QLinearAdd"] == 3 and kinds["QGemm"] == 1
    assert not kinds["Conv"] and not kinds["Gemm"]


class Transformer(nn.Module):
    """Patches, an encoder layer, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_a_transformer_multiplies_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(32, 3, 8, 8)
    masked, realized, _ = made(model, x)
    assert error(run(realized, x), run(masked, x)) < 0.1
    write_onnx(realized, torch.zeros_like(x[:2]), tmp_path / "model.onnx")
    logits = run_onnx(tmp_path / "model.onnx", x, optimized=tmp_path / "optimized.onnx")
    assert error(logits, run(realized, x)) < 0.02
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 1
    assert kinds["MatMulIntegerToFloat"] + kinds["QLinearMatMul"] + kinds["QGemm"] == 5


def test_a_network_with_other_operators_than_the_observed_one_is_refused() -> None:
    model, x = lived_in(residual()), torch.randn(8, 3, 8, 8)
    facts = find_facts(Quantize8(), model, x)
    theta = Quantize8().pi({name: p.detach() for name, p in model.named_parameters()}, 1.0, facts)
    with pytest.raises(ValueError, match=r"has \d+ tensors to quantize, and 10 were observed"):
        Quantize8().realize(nn.Sequential(model, nn.Linear(5, 5)), theta, facts)


def test_files_hold_a_quarter_of_the_bytes(
    shipped: tuple[nn.Module, nn.Module, Tensor, Theta, Path], tmp_path: Path
) -> None:
    model, realized, _, _, folder = shipped
    n_params = sum(p.numel() for p in model.parameters())
    assert (folder / "model.safetensors").stat().st_size < 1.15 * n_params
    assert len(weights.to_bytes(realized.state_dict())) == (folder / "model.safetensors").stat().st_size
    assert (folder / "model.onnx").stat().st_size < 1.35 * n_params
    kinds = Counter(
        stored.data_type for stored in onnx.load(folder / "model.onnx").graph.initializer if stored.dims
    )
    assert kinds[onnx.TensorProto.INT8] >= 10


def test_load_gives_the_module_back_bit_for_bit(
    shipped: tuple[nn.Module, nn.Module, Tensor, Theta, Path],
) -> None:
    _, realized, x, _, folder = shipped
    again = load(folder, SmallResNet(in_channels=3, classes=5))
    assert torch.equal(run(again, x), run(realized, x))
    for name, tensor in realized.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_readme_names_the_file_to_deploy(
    shipped: tuple[nn.Module, nn.Module, Tensor, Theta, Path],
) -> None:
    text = (shipped[-1] / "README.md").read_text()
    assert "`model.onnx` computes in 8-bit integers: it is the file to deploy." in text


@pytest.mark.parametrize("scheme", ["Quantize8", "StructPruneQuantize8", "PruneQuantize8", "Quantize8(bits=4)"])
def test_a_trial_scores_and_sizes_the_quantized_model(
    make_spec: Callable[..., TrialSpec], scheme: str, tmp_path: Path
) -> None:
    parsed = parse_scheme(scheme)
    density = 0.5 if isinstance(parsed, Compose) else 1.0
    spec = make_spec(scheme=parsed, density=density)
    result = run_trial(spec)
    assert result.model is not None
    assert 0 < result.density <= density and (density < 1 or result.density == 1.0)
    assert result.score == spec.task.evaluate(result.model, spec.task.val).score
    weights.save(result.model.state_dict(), tmp_path / "model.safetensors")
    assert result.measurement.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert {p.dtype for p in result.model.parameters() if p.dim() > 1} == {torch.int8}
    again = run_trial(spec)
    assert again.plan == result.plan and again.score == result.score


@pytest.mark.parametrize("method", ["lc", "layerwise", "none"])
def test_activations_are_calibrated_on_the_weights_that_ship(
    make_spec: Callable[..., TrialSpec], method: str
) -> None:
    """And on BatchNorm's statistics, which pruning moves by much."""
    recovery = make_recovery(method, **({} if method == "none" else {"epochs": 1}))
    spec = make_spec(scheme=StructPruneQuantize8(), density=0.3, recovery=recovery)
    model = copy.deepcopy(spec.task.model)
    theta = spec.recovery.recover(model, spec.scheme, spec.facts, 0.3, spec.task, 0).theta
    evidence = Evidence(model, spec.task.train.batches, spec.task.loss)
    seen = Quantize8().observe(evidence, spec.facts[1])
    steps = theta.plan["parts"][1]["steps"]
    # The first step is the input's; the others move with the rounding of the weights, by little.
    for (scale, zero), (scale_now, zero_now) in zip(steps, seen.steps, strict=True):
        assert scale == pytest.approx(scale_now, rel=0.02) and abs(zero - zero_now) <= 2
    assert np.isfinite([scale for scale, _ in steps]).all()


def test_activations_are_looked_at_when_training_is_over() -> None:
    """Their ranges ship with the last model alone; a look costs as much as a good part of an epoch."""
    model, x = lived_in(residual()), torch.randn(4, 3, 8, 8)
    scheme = Quantize8()
    facts = scheme.analyze(model, x[:1])
    evidence = Evidence(
        model, lambda: [(x, torch.zeros(4, dtype=torch.long))], nn.functional.cross_entropy, last=False
    )
    assert scheme.observe(evidence, facts) is facts
    assert scheme.observe(replace(evidence, last=True), facts).steps
