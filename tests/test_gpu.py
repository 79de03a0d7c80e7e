import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from autocompress.experiments.system_metrics import system_metrics
from autocompress.gauges import gpu
from autocompress.gauges.gpu import GpuUsage, GpuWindow

FIELDS = [
    "memory_bytes",
    "process_memory_bytes",
    "utilization_pct",
    "power_w",
    "clock_mhz",
    "throttled",
    "energy_j",
]
CUDA = torch.device("cuda", 0)
UUID = "1b2c3d4e-0000-1111-2222-333344445555"


class FakeNvml:
    """The handful of NVML calls, for one GPU that draws 200 W and fills up by 1 GB a sample.

    Args:
        unsupported: Names of calls that raise, as they do in a container or on a MIG slice.
    """

    class NVMLError(Exception):
        pass

    class NotSupported(NVMLError):
        pass

    def __init__(self, *unsupported: str) -> None:
        self.unsupported = unsupported
        self.handles: list[str] = []
        self.open = 0
        self.memory = 0
        self.threads: set[str] = set()
        self.start = time.monotonic()

    def _call(self, name: str) -> None:
        if name in self.unsupported:
            raise self.NotSupported(name)

    def nvmlInit(self) -> None:
        self._call("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._call("nvmlDeviceGetHandleByUUID")
        self.handles.append(uuid)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        self.threads.add(threading.current_thread().name)
        self._call("nvmlDeviceGetMemoryInfo")
        self.memory += 10**9
        return SimpleNamespace(used=self.memory, free=80 * 10**9 - self.memory, total=80 * 10**9)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self._call("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=80, memory=5)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self._call("nvmlDeviceGetPowerUsage")
        return 200_000

    NVML_CLOCK_SM = 1
    nvmlClocksThrottleReasonSwPowerCap = 0x4
    nvmlClocksThrottleReasonHwSlowdown = 0x8
    nvmlClocksThrottleReasonSwThermalSlowdown = 0x20
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        self._call("nvmlDeviceGetClockInfo")
        assert kind == self.NVML_CLOCK_SM
        return 1980

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self._call("nvmlDeviceGetCurrentClocksThrottleReasons")
        return 0x1 | 0x4  # an idle moment, and the power cap

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._call("nvmlDeviceGetTotalEnergyConsumption")
        return int(200_000 * (time.monotonic() - self.start))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        self._call("nvmlDeviceGetComputeRunningProcesses")
        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 10**9),
            SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=9 * 10**9),
        ]


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for torch's side of a GPU: its UUID."""
    monkeypatch.setattr(gpu, "_uuid", lambda device: UUID)


def sampling_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "autocompress-gpu"]


@pytest.mark.usefixtures("one_gpu")
def test_a_window_reads_everything_in_si_units() -> None:
    nvml = FakeNvml()
    with GpuWindow(CUDA, nvml) as window:
        assert len(sampling_threads()) == 1
        begin = time.monotonic()
        time.sleep(1.1)
        slept = time.monotonic() - begin
    usage = window.usage
    samples = len(usage.timeline)
    assert 2 <= samples <= 10 * slept + 2  # every 100 ms; a busy machine may miss some
    assert usage.memory_bytes == samples * 10**9  # the maximum, not the mean
    assert usage.process_memory_bytes == 3 * 10**9
    assert usage.utilization_pct == 80
    assert usage.power_w == 200
    free = [moment.free_bytes for moment in usage.timeline]
    assert free == [(79 - i) * 10**9 for i in range(samples)]
    seconds = [moment.seconds for moment in usage.timeline]
    assert seconds == sorted(seconds) and seconds[0] >= 0 and seconds[-1] <= slept + 0.5
    assert usage.clock_mhz == 1980
    assert usage.throttled == ("power cap",)
    assert usage.energy_j is not None
    assert usage.energy_j >= 200 * slept - 1
    assert nvml.handles == [f"GPU-{UUID}"]
    assert nvml.threads == {"autocompress-gpu"}
    assert nvml.open == 0
    assert sampling_threads() == []


@pytest.mark.usefixtures("one_gpu")
def test_a_short_window_has_a_sample_but_no_energy() -> None:
    with GpuWindow(CUDA, FakeNvml()) as window:
        pass
    assert len(window.usage.timeline) == 1
    assert window.usage.power_w == 200
    assert window.usage.energy_j is None


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("call", "field"),
    [
        ("nvmlDeviceGetMemoryInfo", "memory_bytes"),
        ("nvmlDeviceGetComputeRunningProcesses", "process_memory_bytes"),
        ("nvmlDeviceGetUtilizationRates", "utilization_pct"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetClockInfo", "clock_mhz"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", "throttled"),
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_j"),
    ],
)
def test_a_call_that_is_not_supported_costs_only_its_own_field(
    call: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "MIN_ENERGY_WINDOW_S", 0.0)
    with GpuWindow(CUDA, FakeNvml(call)) as window:
        pass
    assert [name for name in FIELDS if getattr(window.usage, name) is None] == [field]


@pytest.mark.usefixtures("one_gpu")
def test_process_memory_that_the_driver_hides_is_none() -> None:
    nvml = FakeNvml()
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: [
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)
    ]
    with GpuWindow(CUDA, nvml) as window:
        pass
    assert window.usage.process_memory_bytes is None


@pytest.mark.usefixtures("one_gpu")
def test_a_slice_of_a_gpu_has_memory_of_its_own_and_nothing_else() -> None:
    """As the driver answers under MIG: by the slice's own UUID, and not on what the slices share."""
    shared = (
        "UtilizationRates",
        "PowerUsage",
        "ClockInfo",
        "CurrentClocksThrottleReasons",
        "TotalEnergyConsumption",
    )
    nvml = FakeNvml(*(f"nvmlDeviceGet{name}" for name in (*shared, "TotalEnergyConsumption")))
    by_uuid = nvml.nvmlDeviceGetHandleByUUID

    def only_mig(uuid: str) -> str:
        if not uuid.startswith("MIG-"):
            raise nvml.NotSupported(uuid)
        return by_uuid(uuid)

    nvml.nvmlDeviceGetHandleByUUID = only_mig
    with GpuWindow(CUDA, nvml) as window:
        pass
    assert nvml.handles == [f"MIG-{UUID}"]
    known = [name for name in FIELDS if getattr(window.usage, name) is not None]
    assert known == ["memory_bytes", "process_memory_bytes"]


@pytest.mark.usefixtures("one_gpu")
def test_calls_that_an_older_binding_lacks_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksThrottleReasons")
    with GpuWindow(CUDA, FakeNvml()) as window:
        pass
    assert window.usage.throttled is None
    assert window.usage.clock_mhz == 1980


@pytest.mark.usefixtures("one_gpu")
def test_a_long_window_is_read_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_SAMPLES", 8)
    with GpuWindow(CUDA, FakeNvml(), every_s=0.005) as window:
        time.sleep(0.5)
    assert 4 <= len(window.usage.timeline) <= 8
    seconds = [moment.seconds for moment in window.usage.timeline]
    assert seconds[-1] >= 0.5 and seconds == sorted(seconds)


@pytest.mark.usefixtures("one_gpu")
def test_a_study_logs_load_memory_used_and_free_and_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    metrics = system_metrics("cuda:0")
    assert metrics["system/gpu_utilization_percentage"] == 80
    assert metrics["system/gpu_memory_usage_megabytes"] == 1_000
    assert metrics["system/gpu_memory_free_megabytes"] == 79_000
    assert metrics["system/gpu_power_usage_watts"] == 200


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_driver_or_handle_all_is_none(call: str) -> None:
    nvml = FakeNvml(call)
    with GpuWindow(CUDA, nvml) as window:
        assert sampling_threads() == []
    assert window.usage == GpuUsage()
    assert nvml.open == 0


@pytest.mark.usefixtures("one_gpu")
def test_an_error_in_the_block_ends_the_window_and_comes_through() -> None:
    nvml = FakeNvml()
    with pytest.raises(ZeroDivisionError), GpuWindow(CUDA, nvml):
        _ = 1 / 0
    assert sampling_threads() == []
    assert nvml.open == 0


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a driver")
def test_the_real_nvml_without_a_driver() -> None:
    with GpuWindow(CUDA) as window:
        assert sampling_threads() == []
    assert window.usage == GpuUsage()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_a_gpu_the_window_is_empty(device: str) -> None:
    if device != "cpu" and torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    with GpuWindow(torch.device(device)) as window:
        assert sampling_threads() == []
    assert window.usage == GpuUsage()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_window_sees_it() -> None:
    x = torch.randn(2000, 2000, device="cuda")
    with GpuWindow(torch.device("cuda")) as window:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            x @ x
            torch.cuda.synchronize()
    usage = window.usage
    assert usage.timeline
    for value in (usage.memory_bytes, usage.utilization_pct, usage.power_w, usage.energy_j):
        assert value is None or value > 0
