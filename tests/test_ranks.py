"""One trial in two processes: the steps that it takes in one, and what happens when one dies."""

import runpy
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import autocompress as ac
from autocompress.learning import ranks
from autocompress.learning.ranks import LostProcessError, Share, Team
from autocompress.reading.images import HeldImages, Sampling
from autocompress.reading.transforms import Preprocessing
from autocompress.splits import TensorSplit
from autocompress.task import Task

# Run by itself, the script recovers some models and writes their weights; in a team, rank 0 does.
RECOVERS = """
import sys

import torch
from safetensors.torch import save_file
from torch import nn

from autocompress.reading.images import HeldImages, Sampling
from autocompress.lc import LearningCompression
from autocompress.learning.learner import Learner
from autocompress.recovery import iterative, layerwise
from autocompress.schemes import LowRank, Prune, StructPrune
from autocompress.splits import TensorSplit
from autocompress.task import Task
from autocompress.reading.transforms import Preprocessing


def networks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12, bias=False),
        nn.BatchNorm1d(12, affine=False),
        nn.Linear(12, 3),
    )


def tasks():
    x, y = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 3
    x[y == 0, :, ::2] += 1.5
    held = TensorSplit(x, y, batch_size=7)
    yield "tensors", Task(networks(), held, held, held)
    pixels = (x * 30 + 100).clamp(0, 255).byte()
    sampling = Sampling(7, augmentations=("flip", "rotation"))
    images = HeldImages(pixels, y, Preprocessing((8, 8), 1, 1 / 255), sampling)
    yield "images", Task(networks(), images, images, images)


SGD = {"epochs": 3, "c_steps": 3, "lr": 0.05, "precision": "fp32"}
WAYS = {
    "lc": (StructPrune(), LearningCompression(**SGD)),
    "adamw": (Prune(criterion="taylor"), LearningCompression(**SGD | {"optimizer": "adamw", "lr": 0.001})),
    "iterative": (StructPrune(), iterative(rounds=2, epochs=2, lr=0.05)),
    "layerwise": (StructPrune(criterion="activation"), layerwise(epochs=2, lr=0.05)),
    "low_rank": (LowRank(), LearningCompression(**SGD)),
}


def main(file):
    found = {}
    for kind, task in tasks():
        for name, (scheme, recovery) in WAYS.items():
            model = networks()
            facts = scheme.analyze(model, task.example_input)
            recovered = recovery.recover(model, scheme, facts, 0.5, task, seed=3)
            found |= {f"{kind}/{name}/{key}": value.clone() for key, value in model.state_dict().items()}
            found[f"{kind}/{name}/loss"] = torch.tensor(recovered.curves.get("lc_loss", (0.0,)))
    save_file(found, file)


if __name__ == "__main__":
    from autocompress.learning.ranks import joined

    with joined() as team:
        main(sys.argv[1]) if team.leads else team.serve(Learner)
"""


def numbered(n: int, batch_size: int) -> TensorSplit:
    return TensorSplit(torch.arange(float(n)).view(-1, 1, 1, 1), torch.arange(n), batch_size)


@pytest.mark.parametrize("kind", ["tensors", "images"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_shares_of_a_batch_are_all_of_it(kind: str, size: int) -> None:
    whole: TensorSplit | HeldImages = numbered(23, 5)
    if kind == "images":
        pixels = torch.arange(23 * 4, dtype=torch.uint8).view(23, 1, 2, 2)
        sampling = Sampling(5, augmentations=("flip",))
        whole = HeldImages(pixels, torch.arange(23), Preprocessing((2, 2), 1, 1 / 255), sampling)
    shares = [Team(rank, size).share(whole) for rank in range(size)]
    assert all((share.n_samples, share.batch_size) == (23, 5) for share in shares)
    batches = [list(share.batches(torch.Generator().manual_seed(0))) for share in shares]
    for (x, y), *parts in zip(whole.batches(torch.Generator().manual_seed(0)), *batches, strict=True):
        for rank, (own_x, own_y) in enumerate(parts):
            assert torch.equal(own_x, x[rank::size]) and torch.equal(own_y, y[rank::size])


def test_a_share_of_a_split_of_ones_own_is_cut_from_its_batches() -> None:
    share = Share(numbered(8, 4), 1, 3)
    assert [y.tolist() for _, y in share.batches()] == [[1], [5]]


def test_a_team_of_one_changes_nothing() -> None:
    split, alone = numbered(8, 4), Team()
    assert alone.share(split) is split
    gradient = torch.ones(3)
    alone.average([gradient], samples=4)
    assert gradient.tolist() == [1, 1, 1]
    assert not alone.leads


def test_what_two_processes_cannot_share_is_refused(
    tiny_task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two = Team(0, 2)
    tiny_task.train = numbered(8, 1)
    with pytest.raises(ValueError, match=r"^batches of 1 samples cannot be shared by 2 processes"):
        two.begin(None, tiny_task.model, tiny_task, 0)
    monkeypatch.setattr(ranks, "_team", two)
    with pytest.raises(ValueError, match=r"^workers= and cluster= run several trials at a time, torchrun one"):
        ac.tune(tiny_task, workers=2, out=tmp_path)


def test_after_an_error_in_one_process_alone_nothing_is_sent(tiny_task: Task) -> None:
    two = Team(0, 2)
    with pytest.raises(MemoryError), two.in_step(nn.Identity()):
        raise MemoryError("full")
    with pytest.raises(LostProcessError, match="fell out of step when one said MemoryError: full"):
        two.begin(None, tiny_task.model, tiny_task, 0)
    two.end()  # sends nothing either


def torchrun(*arguments: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_two_processes_recover_what_one_does(tmp_path: Path) -> None:
    """Batches of seven, so that the shares differ in size; BatchNorm, which sees all of a batch."""
    script = tmp_path / "recovers.py"
    script.write_text(RECOVERS)
    with torchrun(script, tmp_path / "two.safetensors", cwd=tmp_path) as run:
        runpy.run_path(str(script))["main"](tmp_path / "one.safetensors")
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    one, two = (load_file(tmp_path / f"{count}.safetensors") for count in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}"
        )


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_and_its_study_goes_on(tmp_path: Path) -> None:
    asked = ["--max-drop", "20%", "--trials", "2", "--epochs", "4", "--name", "pair"]
    with torchrun("-m", "autocompress", "tune", *asked, cwd=tmp_path) as run:
        assert run.stdout is not None
        said: list[str] = []
        while not (said and said[-1].startswith("trial  1")):
            said.append(run.stdout.readline())
            assert said[-1], said
        (helper,) = (one for one in psutil.Process(run.pid).children() if one.environ()["RANK"] == "1")
        helper.kill()
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert sum(line.startswith("digits: ") for line in said) == 1
    assert any("each trial trains in 2 processes" in line for line in said)
    assert "autocompress/ranks.py" not in errors, errors  # a traceback there is torchrun's own
    alone = [sys.executable, "-m", "autocompress", "tune", "--resume", "pair"]
    assert subprocess.run(alone, cwd=tmp_path, check=False, capture_output=True).returncode == 0
