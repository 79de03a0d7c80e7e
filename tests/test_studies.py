"""The studies under examples/ run on small data made here, and print and draw what they promise."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
CLASSES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of three classes, the third rare, told apart by where they are bright."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 96), ("val", 48), ("test", 48)):
        y = np.array([0, 1, 0, 1, 0, 1, 0, 2])[np.arange(n) % 8]
        images = rng.integers(0, 120, (n, 16, 16, 3))
        for k in range(CLASSES):
            images[y == k, 5 * k : 5 * k + 5] += 110
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": y}
    file = tmp_path_factory.mktemp("studies") / "spots.npz"
    np.savez(file, **arrays)
    return file


@pytest.fixture
def study(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a study with quick settings; gives what it printed and the folder that it wrote to."""
    monkeypatch.syspath_prepend(STUDIES)
    monkeypatch.chdir(data.parent)

    def run(name: str, *extra: str) -> SimpleNamespace:
        quick = {"data": "spots.npz", "image-size": 16, "batch-size": 24, "train-epochs": 2, "epochs": 2}
        common = [word for name, value in quick.items() for word in (f"--{name}", str(value))]
        runpy.run_path(str(STUDIES / f"{name}.py"))["main"]([*common, *extra])
        assert [path.name for path in data.parent.iterdir() if path.name != data.name] == ["autocompress-runs"]
        return SimpleNamespace(said=capsys.readouterr().out, drawn=data.parent / "autocompress-runs" / "studies")

    return run


def rows(said: str, title: str) -> list[list[str]]:
    """The table under a title, a list for each line of it below the header."""
    table = said.split(f"\n{title}", 1)[1].split("\n", 1)[1].split("\n\n")[0]
    lines = [line for line in table.splitlines() if not line.startswith(("figure:", "trial", "note"))]
    return [line.split() for line in lines[1:]]


def test_every_study_is_run_here() -> None:
    run_here = {"pruning_ratio", "sparsity", "layer_similarity", "beta_rank", "condensa"}
    assert {file.stem for file in STUDIES.glob("*.py")} == {*run_here, "common"}


@pytest.mark.slow
def test_pruning_ratio(study) -> None:
    done = study("pruning_ratio", "--model", "small_resnet", "--ratios", "20,50")
    dense, *pruned = rows(done.said, "small_resnet on spots")
    assert dense[0] == "dense" and [row[0] for row in pruned] == ["20%", "50%"]
    for row, ratio in zip(pruned, (0.2, 0.5), strict=True):
        kept = float(row[3]) / float(dense[3])
        assert kept == pytest.approx((1 - ratio) ** 2, abs=0.06)  # what the docstring says of the ratio
    svg = (done.drawn / "pruning_ratio.svg").read_text()
    assert "pruning ratio [%]" in svg and "MACs [M]" in svg


@pytest.mark.slow
def test_sparsity(study) -> None:
    line = "--models small_resnet --sparsities 50,90 --searches 2"
    done = study("sparsity", *line.split())
    assert "'frozen': " in done.said and "AUC" in done.said
    (dense,) = rows(done.said, "Dense, on test")
    assert sum(map(float, dense[5:])) == pytest.approx(100, abs=0.1) or "nan" in dense
    _, half, most = rows(done.said, "By sparsity, on test")
    assert (half[1], most[1]) == ("50", "90") and float(most[5]) < 0.11 * 80_000
    assert (done.drawn / "sparsity.svg").is_file()


def test_layer_similarity(study) -> None:
    line = "--models small_resnet --student small_resnet --levels 80 --samples 48"
    done = study("layer_similarity", *line.split())
    ((model, level, *accuracies),) = rows(done.said, "Accuracy on test")
    assert (model, level) == ("small_resnet", "80%") and all(0 <= float(one) <= 100 for one in accuracies)
    similar = rows(done.said, "Linear CKA")
    assert [row[0] for row in similar] == ["iterative", "one-shot", "layer-wise", *2 * ["iterative,"], "student,"]
    assert all(0 < float(row[-1]) <= 1 for row in similar)
    assert (done.drawn / "layer_similarity-small_resnet.png").stat().st_size > 10_000


def test_beta_rank(study) -> None:
    done = study("beta_rank", "--depth", "8", "--repeats", "2")
    table = rows(done.said, "spots, 48 test images, mean ± sd of 2 runs")
    assert [row[0] for row in table] == ["dense", "L1", "HRank", "Beta-Rank"]
    assert all(row.count("±") == 4 for row in table[1:])
    stability = {row[0]: list(map(float, row[1:])) for row in rows(done.said, "Different filters among")}
    assert stability["L1"] == pytest.approx([1 / 3, 1 / 3], abs=1e-3)  # it looks at no batch
    assert all(1 / 3 - 1e-3 <= share <= 1 for shares in stability.values() for share in shares)
    svg = (done.drawn / "beta_rank-grad_cam.svg").read_text()
    assert svg.count("Beta-Rank, P = ") == CLASSES
    assert (done.drawn / "beta_rank-stability.svg").is_file()


def test_condensa(study) -> None:
    line = "--model small_resnet --schemes Prune,Quantize16 --densities 0.1"
    done = study("condensa", *line.split())
    assert "n/a" in (Path(done.said.split("figure: ")[-1].strip())).read_text()
    assert [row[0] for row in rows(done.said, "Accuracy of each class, Prune")] == ["0", "1", "2"]
