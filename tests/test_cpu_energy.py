from pathlib import Path

import pytest
import torch
from torch import nn

from autocompress import measurement
from autocompress.gauges import cpu_energy
from autocompress.gauges.cpu_energy import CpuEnergy


def write_counter(powercap: Path, zone: str, microjoules: int | str) -> None:
    folder = powercap / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        write_counter(tmp_path, zone, 5_000_000)
    with CpuEnergy(tmp_path) as counter:
        assert counter.is_there
        write_counter(tmp_path, "intel-rapl:0", 7_500_000)
        write_counter(tmp_path, "intel-rapl:1", 6_000_000)
        write_counter(tmp_path, "intel-rapl:0:0", 9_000_000)
    assert counter.energy_j == pytest.approx(3.5)


def test_a_counter_that_begins_again(tmp_path: Path) -> None:
    write_counter(tmp_path, "intel-rapl:0", 262_143_328_850 - 1_000_000)
    with CpuEnergy(tmp_path) as counter:
        write_counter(tmp_path, "intel-rapl:0", 2_000_000)
    assert counter.energy_j == pytest.approx(3.0)


@pytest.mark.parametrize("content", [None, ""], ids=["no counters", "no number"])
def test_without_counters_there_is_no_energy(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        write_counter(tmp_path, "intel-rapl:0", content)
    with CpuEnergy(tmp_path) as counter:
        assert not counter.is_there
    assert counter.energy_j is None


def test_energy_of_an_inference_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_counter(tmp_path, "intel-rapl:0", 0)
    monkeypatch.setattr(cpu_energy.CpuEnergy.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(measurement, "ENERGY_WINDOW_S", 0.0)  # one pass

    class Drawing(nn.Linear):
        drawn = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Drawing.drawn += 80_000
            write_counter(tmp_path, "intel-rapl:0", Drawing.drawn)
            return super().forward(x)

    found = measurement.measure(Drawing(2, 2), torch.zeros(1, 2), batch_sizes=(1, 4), budget_s=0.01)
    assert found.energy_j == pytest.approx(0.08 / 4)
