import copy
import os
import random
import time
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autocompress.formats import weights
from autocompress.gauges.latency import PRECISION, TURN_PASSES, interval, time_in_turns
from autocompress.gauges.macs import count_macs, count_params
from autocompress.measurement import compare, measure


class Function(nn.Module):
    """A model without modules, as functional code is."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Bf16Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16()).float()


class Sleep(nn.Module):
    """Takes at least a known time, and writes down when it ran."""

    def __init__(self, seconds: float, log: list[float] | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.log = [] if log is None else log

    def __deepcopy__(self, memo: dict) -> "Sleep":
        raise AssertionError("a model that is on the device already need not be copied")

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.seconds)
        time.sleep(self.seconds)
        return x


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


IMAGE = torch.randn(1, 4, 10, 10)
TOKENS = torch.randn(1, 12, 16)
MATRIX = torch.randn(12, 12)
KERNEL = torch.randn(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("model", "x", "macs"),
    [
        (nn.Conv2d(4, 6, 3), IMAGE, 8 * 8 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGE, 5 * 5 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2), IMAGE, 6 * 6 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=2), IMAGE, 8 * 8 * 8 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), IMAGE, 8 * 8 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 3), IMAGE, 10 * 10 * 4 * 6 * 9),
        (nn.Conv1d(16, 5, 3), TOKENS.mT, 10 * 5 * 16 * 3),
        (nn.Linear(16, 7), TOKENS[:, 0], 16 * 7),
        (nn.Linear(16, 7), TOKENS, 12 * 16 * 7),
        (SelfAttention(16, 4, need_weights=False), TOKENS, 12 * 16 * 16 * 4 + 2 * 12 * 12 * 16),
        (SelfAttention(16, 4, need_weights=True), TOKENS, 12 * 16 * 16 * 4 + 2 * 12 * 12 * 16),
        (
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            TOKENS,
            12 * 16 * 16 * 4 + 2 * 12 * 12 * 16 + 2 * 12 * 16 * 32,
        ),
        (
            Function(lambda x: F.scaled_dot_product_attention(*[x.view(-1, 4, 12, 4)] * 3)),
            TOKENS,
            2 * 4 * 12 * 12 * 4,
        ),
        (Function(lambda x: F.linear(x, torch.ones(7, 16))), TOKENS, 12 * 16 * 7),
        (Function(lambda x: F.conv2d(x, KERNEL)), IMAGE, 8 * 8 * 6 * 4 * 9),
        (Function(lambda x: MATRIX @ x), TOKENS, 12 * 12 * 16),
        (Function(lambda x: torch.einsum("nij,nkj->nik", x, x)), TOKENS, 12 * 12 * 16),
        (nn.LSTM(16, 8, batch_first=True), TOKENS, 12 * 4 * 8 * (16 + 8)),
        (nn.GRU(16, 8, batch_first=True), TOKENS, 12 * 3 * 8 * (16 + 8)),
        (Bf16Inside(nn.Conv2d(4, 6, 3)), IMAGE, 8 * 8 * 6 * 4 * 9),
        (nn.ReLU(), IMAGE, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_of_one_sample_equal_the_closed_form(model: nn.Module, x: Tensor, macs: int) -> None:
    assert count_macs(model, x) == macs
    assert count_macs(model, x.repeat(3, *[1] * (x.dim() - 1))) == macs


def test_counting_macs_leaves_the_model_and_the_backends_as_they_were() -> None:
    model = small_net()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(1, 2, 8, 8))  # a wrong number of channels
    count_macs(model, torch.randn(1, 3, 8, 8))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_counts_without_timing() -> None:
    model = small_net()
    found = measure(model, torch.randn(1, 3, 8, 8), timing=False)
    assert found.params == count_params(model) == 8 * 27 + 16 + 8 * 5 + 5
    assert found.density == 1.0
    assert found.macs == 64 * 8 * 27 + 40
    assert found.size_bytes == len(weights.to_bytes(model.state_dict()))
    assert found.device == "cpu"
    assert found.latency == ()
    timed = ["latency_ms", "throughput_per_s", "peak_memory_bytes", "gpu_memory_bytes"]
    assert [getattr(found, name) for name in timed] == [None] * 4


def test_density_is_over_the_dense_model() -> None:
    x = torch.randn(1, 4)
    assert measure(nn.Linear(4, 3), x, dense_params=60, timing=False).density == 15 / 60
    pruned = measure(nn.Linear(4, 3), x, dense_params=60, params=6, timing=False)
    assert (pruned.params, pruned.density) == (6, 0.1)
    several = compare([nn.Linear(4, 3)] * 2, x, dense_params=60, params=[None, 6], timing=False)
    assert [m.params for m in several] == [15, 6]


def test_a_tied_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count_params(model) == 16


def test_a_model_without_parameters_can_be_measured() -> None:
    found = measure(nn.ReLU(), torch.randn(1, 4), timing=False)
    assert (found.params, found.density, found.macs) == (0, 1.0, 0)


def test_timing_gives_every_batch_size_and_no_gpu_field_on_a_cpu() -> None:
    found = measure(nn.Linear(4, 3), torch.randn(5, 4), batch_sizes=(16, 1, 4), budget_s=0.05)
    assert [latency.batch for latency in found.latency] == [1, 4, 16]
    for latency in found.latency:
        assert 0 < latency.p50_ms <= latency.p95_ms
        assert latency.repeats >= 20
    assert found.latency_ms == found.latency[0].p50_ms
    assert found.throughput_per_s == pytest.approx(16e3 / found.latency[-1].p50_ms)
    assert found.gpu_memory_bytes is None
    assert found.gpu_utilization_pct is None
    assert found.gpu_power_w is None
    assert found.energy_j is None


def test_latency_is_the_time_the_forward_pass_takes() -> None:
    fast, slow = compare([Sleep(0.001), Sleep(0.02)], torch.zeros(1, 2), batch_sizes=(1,), budget_s=0.05)
    # Lower bounds hold on the busiest machine.
    assert fast.latency[0].p50_ms >= 1
    assert slow.latency[0].p50_ms >= 20
    assert fast.latency[0].p50_ms < slow.latency[0].p50_ms


def test_models_take_turns() -> None:
    log: list[float] = []
    x = torch.zeros(1, 2)
    compare([Sleep(0.003, log), Sleep(0.0025, log)], x, batch_sizes=(1,), budget_s=0.01)
    counting, warm_up, memory = 2, 6, 2
    timed = log[counting + warm_up : -memory]
    turns = [(seconds, len(list(passes))) for seconds, passes in groupby(timed)]
    assert turns == [(0.003, 1 + TURN_PASSES), (0.0025, 1 + TURN_PASSES)] * (len(turns) // 2)
    assert len(turns) >= 2 * 20 / TURN_PASSES


def test_batches_take_turns_until_each_is_known() -> None:
    """A batch whose median is known early waits no longer for one whose is not."""
    log: list[int] = []
    chance = random.Random(0)

    def run(x: Tensor) -> None:
        log.append(len(x))
        time.sleep(0.002 + (len(x) == 3 and 0.004 * chance.randrange(2)))

    (found,) = time_in_turns([run], [torch.zeros(n, 2) for n in (2, 3)], budget_s=0.6)
    assert [one.batch for one in found] == [2, 3]
    turns = [batch for batch, _ in groupby(log[6:])]
    both = [2, 3] * turns.count(2)
    assert turns == both  # the last turns are the third batch's alone, and so are one
    assert turns.count(2) >= 20 / TURN_PASSES
    assert found[0].repeats + 20 < found[1].repeats


def test_what_a_model_finds_after_another_is_not_timed() -> None:
    class Woken(Sleep):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.0 if self.log[-1:] == [self.seconds] else 0.02)
            return super().forward(x)

    log: list[float] = []
    for (found,) in time_in_turns([Woken(0.0002, log), Woken(0.001, log)], [torch.zeros(1, 2)], budget_s=0.01):
        assert found.p95_ms < 20
    quick = [len(list(passes)) for seconds, passes in groupby(log[6:]) if seconds == 0.0002]
    assert sum(quick) / len(quick) > 1 + TURN_PASSES  # a turn lasts some milliseconds


def test_timing_stops_at_its_budget() -> None:
    class Jitter(Sleep):
        def forward(self, x: Tensor) -> Tensor:
            self.seconds = 0.012 - self.seconds  # 2 ms, 10 ms, 2 ms, ...: the median is never known to 3%
            return super().forward(x)

    found = measure(Jitter(0.002), torch.zeros(1, 2), batch_sizes=(1,), budget_s=0.3)
    assert 20 <= found.latency[0].repeats <= 0.3 / 0.006 + 2


def _median_is_known(times: list[float]) -> bool:
    return interval(times) <= PRECISION


def test_the_median_is_known_when_its_interval_is_narrow() -> None:
    generator = torch.Generator().manual_seed(0)
    steady = (1 + 0.01 * torch.randn(30, generator=generator)).tolist()
    wild = (1 + 0.3 * torch.randn(30, generator=generator)).tolist()
    assert _median_is_known(steady)
    assert not _median_is_known(wild)
    assert _median_is_known((1 + 0.3 * torch.randn(5000, generator=generator)).tolist())
    assert _median_is_known([*steady, 50.0, 80.0, 90.0])  # a few late ones move no median


def test_the_medians_interval_covers_the_true_median() -> None:
    """The ranks behind `_median_is_known` against the binomial distribution, by simulation."""
    generator = torch.Generator().manual_seed(0)
    n, half = 40, 0.98 * 40**0.5
    ranked = torch.rand(4000, n, generator=generator).sort(dim=1).values
    low, high = ranked[:, int(n / 2 - half)], ranked[:, -int(-(n / 2 + half) // 1)]
    covered = ((low <= 0.5) & (high >= 0.5)).float().mean()
    assert 0.94 < covered < 0.99


class Peak(nn.Module):
    """Holds 3n + 2n floats at the most, 3n of them freed before a later 4n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.weight = nn.Parameter(torch.zeros(100))
        self.register_buffer("buffer", torch.zeros(7, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.empty(3 * self.n * len(x))
        second = torch.empty(2 * self.n * len(x))
        del first, second
        return torch.empty(4 * self.n * len(x))


def test_peak_memory_is_what_was_held_at_once() -> None:
    found = measure(Peak(50_000), torch.zeros(1, 2), batch_sizes=(1, 3), budget_s=0.01)
    assert found.peak_memory_bytes == 4 * 100 + 8 * 7 + 3 * 5 * 50_000 * 4


def test_peak_memory_of_layers() -> None:
    model = nn.Sequential(nn.Linear(10, 200), nn.Linear(200, 300), nn.Linear(300, 10)).eval()
    found = measure(model, torch.zeros(1, 10), batch_sizes=(8,), budget_s=0.01)
    weights_bytes = 4 * count_params(model)
    # Both hidden activations are held while the second layer computes.
    assert found.peak_memory_bytes == weights_bytes + 4 * 8 * (200 + 300)


def test_memory_is_measured_without_noise_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    measure(nn.Linear(2, 2), torch.zeros(1, 2), batch_sizes=(1,), budget_s=0.01)
    assert capfd.readouterr().err == ""
    assert dict(os.environ) == before


def test_measuring_changes_nothing_of_the_models() -> None:
    model = small_net()
    model[1].eval()
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    compare([model, model], torch.randn(1, 3, 4, 4), batch_sizes=(2,), budget_s=0.01)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(torch.randn(2, 3, 8, 8)).sum().backward()  # it still trains


def test_a_16_bit_model_is_measured_through_its_32_bit_interface() -> None:
    dense, x = small_net(), torch.randn(1, 3, 4, 4)
    found = measure(Bf16Inside(copy.deepcopy(dense)), x, batch_sizes=(2,), budget_s=0.01)
    plain = measure(dense, x, timing=False)
    assert found.macs == plain.macs
    assert found.size_bytes < plain.size_bytes
    assert found.latency_ms is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "meta"}, "meta"),
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0, 4)}, "batch_sizes"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(nn.Linear(2, 2), torch.zeros(1, 2), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_models_stay_where_they_are_and_gpu_fields_are_numbers() -> None:
    model = small_net()
    found = measure(model, torch.randn(1, 3, 8, 8), "cuda", batch_sizes=(1, 8), budget_s=0.1)
    assert next(model.parameters()).device.type == "cpu"
    assert found.device.startswith("cuda:0 ")
    assert found.latency_ms > 0
    # The first convolution's output and the one after it are held at once.
    assert found.peak_memory_bytes >= 4 * count_params(model) + 2 * 8 * 8 * 64 * 4
    assert (
        found.macs
        == count_macs(model, torch.randn(1, 3, 8, 8))
        == count_macs(copy.deepcopy(model).cuda(), torch.randn(1, 3, 8, 8))
    )
    for value in (found.gpu_memory_bytes, found.gpu_utilization_pct, found.gpu_power_w, found.energy_j):
        assert value is None or value > 0
