import time

import psutil
import pytest
import torch

from autocompress.experiments.system_metrics import SystemMonitor, system_metrics


def test_what_can_be_measured_is_and_nothing_else():
    metrics = system_metrics("cpu")
    assert set(metrics) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_percentage",
        "system/system_memory_usage_megabytes",
        "system/process_memory_megabytes",
    }
    total = psutil.virtual_memory().total / 1e6
    assert 0 < metrics["system/process_memory_megabytes"] < metrics["system/system_memory_usage_megabytes"] < total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_of_a_gpu_its_load_its_memory_and_its_power():
    metrics = system_metrics("cuda")
    assert metrics["system/gpu_memory_usage_megabytes"] > 0


def test_a_monitor_reads_until_it_is_stopped():
    readings = []
    monitor = SystemMonitor("cpu", readings.append, every_s=0.05)
    monitor.start()
    busy_until = time.perf_counter() + 0.5
    while time.perf_counter() < busy_until:
        pass
    monitor.stop()
    n = len(readings)
    time.sleep(0.2)
    assert 1 <= n == len(readings)
    assert max(reading["system/cpu_utilization_percentage"] for reading in readings) > 0
