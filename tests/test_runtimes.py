import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autocompress.formats.onnx_export import write_onnx
from autocompress.gauges import runtimes
from autocompress.gauges.runtimes import RUNTIMES, CannotRun, check_runtime, installed, prepare
from autocompress.measurement import compare, measure

CPU = torch.device("cpu")
IMAGE = torch.randn(3, 3, 8, 8)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Branching(nn.Module):
    """What no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else x


@torch.inference_mode()
def test_onnx_runtime_computes_what_the_model_computes() -> None:
    model = small_net()
    run = prepare("onnxruntime", model, IMAGE)
    for x in (IMAGE, IMAGE[:1], IMAGE.to(memory_format=torch.channels_last)):
        (found,) = run(x)
        assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


@torch.inference_mode()
def test_onnx_runtime_leaves_the_cores_to_the_next_model() -> None:
    model, x = nn.Linear(1024, 1024).eval(), torch.zeros(256, 1024)
    with threads(2):
        run = prepare("onnxruntime", model, x)
        used = []
        for _ in range(5):
            run(x)
            before = time.process_time()
            time.sleep(0.02)
            used.append(time.process_time() - before)
    assert min(used) < 0.002


@torch.inference_mode()
def test_onnx_runtime_runs_the_file_that_ships_where_there_is_one(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)).eval()
    write_onnx(other, IMAGE, tmp_path / "model.onnx")
    (found,) = prepare("onnxruntime", small_net(), IMAGE, tmp_path / "model.onnx")(IMAGE)
    assert torch.allclose(torch.from_numpy(found), other(IMAGE), atol=1e-5)
    none = tmp_path / "none.onnx"
    (timed,) = compare([other], IMAGE, runtimes=("onnxruntime",), onnx_files=[none], budget_s=0.02)
    assert str(none) in timed.not_run["onnxruntime"]


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_code_computes_what_the_model_computes() -> None:
    model = small_net()
    assert torch.allclose(prepare("compile", model, IMAGE)(IMAGE), model(IMAGE), atol=1e-5)


def test_every_runtime_is_timed_beside_the_others_and_objectives_see_the_first() -> None:
    timed = {"batch_sizes": (1, 2), "budget_s": 0.02}
    dense, other = compare([small_net(), small_net()], IMAGE, runtimes=("onnxruntime", "eager"), **timed)
    for found in (dense, other):
        assert [(one.runtime, one.batch) for one in found.latency] == [
            ("onnxruntime", 1),
            ("onnxruntime", 2),
            ("eager", 1),
            ("eager", 2),
        ]
        assert found.latency_ms == found.latency[0].p50_ms
        assert found.throughput_per_s == pytest.approx(2e3 / found.latency[1].p50_ms)
        assert (found.runtime, found.dtype, found.memory_format) == ("onnxruntime", "float32", "channels_last")
        assert found.threads == torch.get_num_threads()
        assert all(one.interval is not None and one.interval > 0 for one in found.latency)


def test_what_a_runtime_does_not_take_is_said_and_costs_only_its_own_rows() -> None:
    plain, branching = compare(
        [nn.Linear(4, 4), Branching()],
        torch.ones(1, 4),
        runtimes=("onnxruntime", "eager"),
        batch_sizes=(1,),
        budget_s=0.01,
    )
    assert [one.runtime for one in plain.latency] == ["onnxruntime", "eager"]
    assert [one.runtime for one in branching.latency] == ["eager"]
    assert branching.latency_ms is None
    assert branching.not_run["onnxruntime"].startswith("ONNX Runtime does not take this model: ")
    assert "\n" not in branching.not_run["onnxruntime"]


def test_integers_are_timed_where_they_are_computed() -> None:
    model = nn.Linear(4, 4).eval()
    model.weight = nn.Parameter(model.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CannotRun, match=r"only simulates its 8-bit integers.*onnxruntime"):
        prepare("eager", model, torch.ones(1, 4))


def test_a_runtime_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"runtime='tensorrt'; it must be one of eager, compile, onnxruntime"):
        check_runtime("tensorrt")
    assert "eager" in installed(CPU) and set(installed(CPU)) <= set(RUNTIMES)
    assert "onnxruntime" not in installed(torch.device("cuda:0"))
    runtimes._missing.cache_clear()
    monkeypatch.setattr(runtimes.shutil, "which", lambda program: None)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    assert installed(CPU) == ("eager",)
    with pytest.raises(ValueError, match=r"runtime='compile': torch.compile needs a C\+\+ compiler"):
        measure(nn.Linear(2, 2), torch.zeros(1, 2), runtimes=("compile",))
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        check_runtime("onnxruntime")
    runtimes._missing.cache_clear()


class Echo(nn.Linear):
    """Returns its input as well, which ONNX has under another name then."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_what_fails_only_when_it_runs_is_said_as_well_and_by_its_cause() -> None:
    measured = partial(measure, runtimes=("onnxruntime", "eager"), batch_sizes=(1,), budget_s=0.01)
    echo = measured(Echo(4, 4), torch.ones(1, 4))
    assert [one.runtime for one in echo.latency] == ["eager"]
    assert "input_orig" in echo.not_run["onnxruntime"]
    half = measured(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).bfloat16(), IMAGE[:, :1].bfloat16())
    said = half.not_run["onnxruntime"]
    assert "RuntimeError: " in said and "torch.export" not in said and "\x1b" not in said
