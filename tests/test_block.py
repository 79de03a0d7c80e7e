import math

import pytest
import torch
from torch import Tensor, nn

from autocompress.conformance.testing_models import some_models
from autocompress.formats import weights
from autocompress.models import SmallResNet
from autocompress.scheme import Compose, Scheme, Theta
from autocompress.schemes import BlockPrune, Quantize16
from autocompress.testing import Case, SchemeConformance, lived_in

FEW = (0.7, 0.2, 0.05)  # densities, where the scheme itself is checked at more of them


class Blockwise(SchemeConformance):
    __test__ = False

    def unit_size(self, case: Case) -> int:
        return 16


class TestBlockPrune(Blockwise):
    def make_scheme(self) -> Scheme:
        return BlockPrune()


class TestBlockPruneOfUnequalSides(Blockwise):
    models = some_models("concatenated", "depthwise", "attention")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return BlockPrune(block=(3, 5), criterion="l1", min_keep=2)


class TestBlockPruneByGradients(Blockwise):
    models = some_models("gated", "grouped", "plain")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return BlockPrune(criterion="obd")


class TestBlockPruneQuantize16(Blockwise):
    models = some_models("residual", "flattened", "tied")
    densities = FEW

    def make_scheme(self) -> Scheme:
        return Compose(BlockPrune(), Quantize16(dtype="bf16"))


def projected(scheme: BlockPrune, model: nn.Module, density: float) -> tuple[Theta, dict[str, Tensor]]:
    facts = scheme.analyze(model, torch.empty(0))
    w = {name: p.detach() for name, p in model.named_parameters()}
    return scheme.pi(w, max(density, scheme.lowest_density(facts)), facts), w


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.1])
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_smallest_blocks_go(density: float, criterion: str) -> None:
    """Brute force: blocks cut out one by one, the edges ragged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False))
    theta, w = projected(BlockPrune(block=(4, 3), criterion=criterion), model, density)
    blocks, safe = [], set()
    for name, matrix in w.items():
        rows, columns = matrix.shape
        found = [
            (float((block.abs() if criterion == "l1" else block.square()).mean()), block.numel(), (name, i, j))
            for i in range(0, rows, 4)
            for j in range(0, columns, 3)
            for block in [matrix[i : i + 4, j : j + 3]]
        ]
        safe.add(max(found, key=lambda found: (found[1], found[0]))[2])
        blocks += found
    left, gone = 10 * 9 + 9 * 7, set()
    for _, size, place in sorted(blocks):
        if left / (10 * 9 + 9 * 7) <= density:
            break
        if place not in safe:
            left -= size
            gone.add(place)
    assert theta.kept == left
    for _, _, (name, i, j) in blocks:
        kept = theta.support[name][i : i + 4, j : j + 3]
        assert kept.any() == kept.all() == ((name, i, j) not in gone)


def test_a_block_of_a_convolution_lies_within_one_position_of_the_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(8, 8, 3, bias=False)
    with torch.no_grad():
        model.weight[:4, 4:, 1, 2] += 10  # outputs x inputs at one position
        model.weight[4:, :4, 0, 0] += 5
    theta, _ = projected(BlockPrune(), model, 2 * 16 / model.weight.numel())
    expected = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    expected[:4, 4:, 1, 2] = expected[4:, :4, 0, 0] = True
    assert torch.equal(theta.support["weight"], expected)


def test_blocks_that_are_zero_already_go_whatever_the_target() -> None:
    model = lived_in(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)))
    with torch.no_grad():
        model[1].weight[:4, 8:16] = 0
    theta, _ = projected(BlockPrune(), model, 1.0)
    assert theta.kept == 192 * 8 + 8 - 32


def test_every_layer_keeps_its_floor_and_skipped_layers_are_whole() -> None:
    model = lived_in(SmallResNet(in_channels=3))
    theta, _ = projected(BlockPrune(min_keep=3, skip="classifier"), model, 0.0)
    assert "classifier.weight" not in theta.support
    assert {int(mask.sum()) for name, mask in theta.support.items() if "stem" not in name} == {48}


def test_the_file_is_as_small_as_the_blocks() -> None:
    model = lived_in(SmallResNet(in_channels=3))
    theta, _ = projected(BlockPrune(), model, 0.1)
    masked = sum(mask.numel() for mask in theta.support.values()) / 16
    share = theta.kept / sum(p.numel() for p in model.parameters())
    entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)  # of a block's place, in bits
    headers = 250 * len(theta.values)
    assert len(weights.to_bytes(theta.values)) <= 1.15 * (4 * theta.kept + masked * entropy / 8) + headers


@pytest.mark.parametrize("block", [4, (4,), (4, 0), (4, 2.5), "4x4", (1, 2, 3)])
def test_what_is_no_block_is_refused(block: object) -> None:
    with pytest.raises(ValueError, match=r"it must be two positive numbers, as in \(4, 4\)"):
        BlockPrune(block=block)  # type: ignore[arg-type]  # what is tested


def test_settings_and_models_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_keep=0; every layer must keep at least 1 block"):
        BlockPrune(min_keep=0)
    with pytest.raises(ValueError, match="criterion='lamp'; BlockPrune takes l1, l2, taylor, obd, random"):
        BlockPrune(criterion="lamp")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="BlockPrune finds no weights in this model that are larger than a block"):
        BlockPrune().analyze(nn.Linear(4, 4), torch.zeros(1, 4))
