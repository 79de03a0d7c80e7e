"""CKA against its definition and its invariances."""

import pytest
import torch
from torch import nn

import autocompress as ac


def features(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_it_is_the_cross_covariance_over_the_covariances() -> None:
    x, y = features(40, 5), features(40, 3, seed=1)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert ac.linear_cka(x, y) == pytest.approx(float(expected))


def test_rotation_scale_and_shift_do_not_matter_but_a_linear_map_does() -> None:
    x = features(50, 6)
    rotation, _ = torch.linalg.qr(features(6, 6, seed=2))
    assert ac.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])
    assert ac.linear_cka(x, stretched) < 0.9
    assert ac.linear_cka(x, torch.ones(50, 2)) == 0
    assert ac.linear_cka(x, features(50, 6, seed=3)) < 0.4


def test_layers_are_compared_by_name_and_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).train()
    b = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(30, 1, 8, 8)
    before = a[1].running_mean.clone()
    both = ac.layer_similarity(a, b, x)
    assert list(both.index) == ["0", "4"] and list(both.columns) == ["1"]
    a.eval()
    assert both.loc["4", "1"] == pytest.approx(ac.linear_cka(a(x), b(x)))
    own = ac.layer_similarity(a, a, x)
    assert own.loc["0", "0"] == pytest.approx(1) and own.loc["0", "4"] == pytest.approx(own.loc["4", "0"])
    assert torch.equal(a[1].running_mean, before) and not a[0]._forward_hooks
