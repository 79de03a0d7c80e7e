import os
import runpy
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.goal import as_objective
from autocompress.lc import LearningCompression
from autocompress.schemes import StructPrune
from autocompress.task import Task, device_of
from autocompress.trial import Bound, TrialSpec

MOST_PROCESSES = 8  # each of them, with what its tests start, takes 2 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core for the whole suite; none for named files and tests, which are over before one has started.

    ``-n 2`` has the last word.
    """
    if any(".py" in argument for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """Seeds the layers that lists of parameters make when a file is imported: the same ones in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """Ctrl-C works, for this process and those that it starts: what a shell runs in the background ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small operations gain nothing from a second thread, and one alone is reproducible anywhere."""
    torch.set_num_threads(1)


def striped(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of three classes: horizontal stripes, vertical stripes, none."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 1, 8, 8, generator=generator)
    x[y == 0, :, ::2] += 1.5
    x[y == 1, :, :, ::2] += 1.5
    return x, y


@pytest.fixture
def tiny_task() -> Task:
    """60 samples of 1x8x8 in three classes, and a network of two convolutions trained on them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    task = Task(model, striped(60, 1), striped(60, 2), striped(60, 3), name="stripes")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        x, y = next(task.train.batches())
        task.loss(model(x), y).backward()
        optimizer.step()
    model.eval()
    return task


@pytest.fixture
def make_spec(tiny_task: Task) -> Callable[..., TrialSpec]:
    """Makes the specification of a quick trial on the tiny task; keywords replace what it holds."""

    def make(number: int = 1, density: float = 0.5, **changes: Any) -> TrialSpec:
        task, scheme = changes.get("task", tiny_task), changes.get("scheme", StructPrune())
        settings: dict[str, Any] = {
            "task": task,
            "scheme": scheme,
            "facts": scheme.analyze(task.model, task.example_input.to(device_of(task.model))),
            "recovery": LearningCompression(epochs=4, c_steps=2, lr=0.05),
            "objectives": (as_objective("density"),),
            "bound": Bound(0.1),
            "dense": task.evaluate(task.model, task.val),
            "seed": 1000 + number,
        }
        return TrialSpec(number, density, **(settings | changes))

    return make


@pytest.fixture(scope="session")
def die() -> Callable[..., str]:
    """Ends the process that calls it as a system does that is out of memory; given a file, only the first time."""

    def die(marker: Path | None = None) -> str:
        if marker is not None:
            if marker.exists():
                return "done"
            marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    return die


@pytest.fixture(scope="session")
def stripes() -> Callable[..., np.ndarray]:
    """Makes grey images of 10 x 10 pixels whose class is how bright one of their stripes is."""

    def stripes(classes: np.ndarray, seed: int = 0) -> np.ndarray:
        images = np.random.default_rng(seed).integers(0, 120, size=(len(classes), 10, 10), dtype=np.uint8)
        for k in np.unique(classes):
            images[classes == k, 2 * k : 2 * k + 2] += 120
        return images

    return stripes


@pytest.fixture
def striped_file(stripes: Callable[..., np.ndarray], tmp_path: Path) -> Callable[..., str]:
    """Writes such images of the given classes, by part, to a file as MedMNIST's: its path."""

    def write(**classes: np.ndarray) -> str:
        images = {f"{part}_images": stripes(y, seed) for seed, (part, y) in enumerate(classes.items())}
        np.savez(tmp_path / "stripes.npz", **images, **{f"{part}_labels": y for part, y in classes.items()})
        return str(tmp_path / "stripes.npz")

    return write


def source(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(name))))


@pytest.fixture(scope="session")
def recorded() -> SimpleNamespace:
    """The functions of ``recorded.py``: studies as they lie on disk, made up."""
    return source("recorded.py")


@pytest.fixture(scope="session")
def second_device() -> Callable[[], AbstractContextManager[None]]:
    """In its ``with`` block ``cuda`` is a stand-in, see ``second_device.py``."""
    return source("second_device.py").second_device


@pytest.fixture(scope="session", autouse=True)
def fresh() -> Iterator[Any]:
    """Runs exported files in processes that need no imports, of `Fresh` of ``fresh.py``."""
    with source("fresh.py").Fresh() as instead:
        yield instead


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, fresh: Any) -> Iterator[Any]:
    """Starts processes that need no imports: ``Warm`` of ``warm.py``."""
    with source("warm.py").Warm(tmp_path_factory.mktemp("warm"), fresh.address()) as started:
        yield started


@pytest.fixture
def from_nothing(fresh: Any) -> Iterator[None]:
    """Runs exported files in processes that begin with nothing, as autocompress does."""
    with fresh.left_alone():
        yield
