"""Bring your own model and data on the command line: processes of their own, small data made on the fly."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NOT_MET, USAGE = 3, 2
FAST = ("--train-epochs", "3", "--train-lr", "0.01", "--batch-size", "16", "--epochs", "2", "--trials", "2")


@pytest.fixture(scope="module")
def run(warm: Any) -> Callable[..., Any]:
    """Runs the command line in a folder."""
    return lambda cwd, *args: warm.run(["autocompress", *args], cwd, {**os.environ, "COLUMNS": "80"})


def bands(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes of noise: bright above, or bright below."""
    x = np.random.default_rng(seed).integers(0, 120, size=(n, 10, 10), dtype=np.uint8)
    y = np.arange(n) % 2
    x[y == 0, :3] += 120
    x[y == 1, -3:] += 120
    return x, y


def write_npz(file: Path, seed: int = 0) -> None:
    stored = {}
    for i, part in enumerate(("train", "val", "test")):
        stored[f"{part}_images"], stored[f"{part}_labels"] = bands(48, 3 * seed + i)
    np.savez(file, **stored)


@pytest.fixture(scope="module")
def job(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A study of an .npz with a second metric as a constraint, run once for the tests here."""
    cwd = tmp_path_factory.mktemp("job")
    write_npz(cwd / "bands.npz")
    asked = ("--data", "bands.npz", "--metric", "auc", "--max-drop", "0.2", "--constraint", "sensitivity>=0.5")
    return cwd, run(cwd, "tune", *asked, "--augment", "jitter", *FAST, "--name", "mine", "--json")


def test_the_whole_job_on_own_data(job: tuple[Path, Any]) -> None:
    cwd, ended = job
    assert ended.status in (0, NOT_MET), ended.stderr
    found = json.loads(ended.stdout)
    assert found["scores"]["dense"]["val"] > 0.9
    assert "training the dense model: epoch 1 of at most 3" in ended.stderr
    assert "sensitivity is the share found of class '1'" in ended.stderr
    assert all("sensitivity>=0.5" in trial for trial in found["trials"])
    if ended.status == 0:
        assert found["constraints"][0]["val"]["value"] >= 0.5
        assert [row["support"] for row in found["classes"]] == [24, 24]
        assert "On test sensitivity is" in found["sentence"]
    stored = json.loads((cwd / "autocompress-runs" / "mine" / "study.json").read_text())
    assert stored["constraints"] == ["sensitivity>=0.5"]
    assert stored["task_options"]["data"] == str(cwd / "bands.npz")
    assert stored["task_options"]["augment"] == ["jitter"]


def test_resume_alone_takes_the_model_and_the_data_of_the_study(
    job: tuple[Path, Any], run: Callable[..., Any]
) -> None:
    cwd, _ = job
    elsewhere = cwd / "elsewhere"
    elsewhere.mkdir()
    again = run(
        elsewhere, "tune", "--resume", "mine", "--out", str(cwd / "autocompress-runs"), "--trials", "3", "--json"
    )
    assert again.status in (0, NOT_MET), again.stderr
    assert "epoch 1" not in again.stderr, "the dense model comes from the cache"
    assert len(json.loads(again.stdout)["trials"]) >= 2


OF_MY_OWN = """
from dataclasses import dataclass
from autocompress.schemes import Prune

@dataclass(frozen=True)
class Mine(Prune):
    pass

def weights(measurement):
    return float(measurement.params)

def right(targets, outputs):
    return float((outputs.argmax(1) == targets).mean())

def half(targets, outputs):
    return right(targets, outputs) / 2
"""


@pytest.mark.parametrize("folder", ["mine", "a+b, (2)"])
def test_what_came_from_files_is_found_again_from_any_folder(
    run: Callable[..., Any], tmp_path: Path, folder: str
) -> None:
    """Though a file of the same name, which is another, lies there; and it is written as it was at first."""
    begun, other = tmp_path / "begun", tmp_path / "other"
    for place, source in ((begun / folder, OF_MY_OWN), (other / folder, "1 / 0")):
        place.mkdir(parents=True)
        (place / "own.py").write_text(source)
    out, file = ("--out", str(tmp_path / "out")), f"{folder}/own.py"
    scheme = f"{file}:Mine" if folder == "mine" else f"'{file}:Mine'"
    of_files = ("--scheme", scheme, "--metric", f"{file}:right", "--recovery", "none")
    required = ("--objective", f"{file}:weights", "--constraint", f"{file}:right>=0.1", "--max-drop", "99%")
    first = run(begun, "tune", *of_files, *required, "--trials", "1", "--name", "s", *out, "--json")
    assert first.status == 0, first.stderr
    again = run(other, "tune", "--resume", "s", "--trials", "2", *out, "--json")
    assert again.status == 0, again.stderr
    assert len(json.loads(again.stdout)["trials"]) == 2
    asked = json.loads((tmp_path / "out" / "s" / "study.json").read_text())
    assert asked["files"] == {file: str(begun / file)}
    kept = [asked[name] for name in ("scheme", "objective", "metric", "constraints")]
    assert kept == [scheme, f"{file}:weights", f"{file}:right", [f"{file}:right>=0.1"]]
    (other / file).write_text(OF_MY_OWN)
    for option, name in (("--scheme", scheme), ("--objective", f"{file}:weights")):
        refused = run(other, "tune", "--resume", "s", option, name, *out)
        assert refused.status == USAGE
        assert f"{other / folder}/own.py" in refused.stderr.splitlines()[-1]
    densities = ("--densities", "0.5", "--no-timing", "--also", f"{file}:half", "--name", "w")
    swept = run(begun, "sweep", *of_files, *densities, *out)
    assert swept.status == 0, swept.stderr
    again = run(other, "sweep", "--resume", "w", *out, "--json", "--quiet")
    assert again.status == 0, again.stderr
    assert json.loads(again.stdout)["cells"][1]["row"]["scheme"] == scheme


OWN_LAYERS = """
from torch import nn

def head(n):
    return nn.Sequential(nn.Conv2d(1, n, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * n, 2))
"""


def test_a_package_of_the_folder_that_was_current_is_found_again_from_any_folder(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Its modules import each other, so it cannot be run as a file; and another of its name lies there."""
    begun, other = tmp_path / "begun", tmp_path / "other"
    for place, source in ((begun, "from .layers import head\n\ndef net():\n    return head(4)"), (other, "1 / 0")):
        (place / "own_nets").mkdir(parents=True)
        (place / "own_nets" / "__init__.py").touch()
        (place / "own_nets" / "layers.py").write_text(OWN_LAYERS)
        (place / "own_nets" / "small.py").write_text(source)
    write_npz(begun / "bands.npz")
    out = ("--out", str(tmp_path / "out"))
    task = ("--data", "bands.npz", "--model", "own_nets.small:net", "--max-drop", "99%", "--recovery", "none")
    first = run(begun, "tune", *task, "--train-epochs", "1", "--trials", "1", "--name", "s", *out, "--json")
    assert first.status == 0, first.stderr
    asked = json.loads((tmp_path / "out" / "s" / "study.json").read_text())
    assert asked["files"] == {"own_nets.small": str(begun / "own_nets" / "small.py")}
    again = run(other, "tune", "--resume", "s", "--trials", "2", *out, "--json")
    assert again.status == 0, again.stderr
    assert len(json.loads(again.stdout)["trials"]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--name", "mine"), "a study named 'mine' is in"),
        (("--workers", "2", "--cluster", "tcp://localhost:1"), "workers=2 are of this machine"),
    ],
)
def test_what_is_wrong_is_said_before_the_dense_model_is_trained(
    job: tuple[Path, Any], run: Callable[..., Any], args: tuple[str, ...], message: str
) -> None:
    cwd, _ = job
    ended = run(cwd, "tune", "--data", "bands.npz", "--task-seed", "7", *FAST, *args)
    assert ended.status == USAGE
    assert message in ended.stderr and ended.stdout == ""


@pytest.mark.slow
def test_resume_refuses_other_options_and_other_data(job: tuple[Path, Any], run: Callable[..., Any]) -> None:
    cwd, _ = job
    other = run(cwd, "tune", "--resume", "mine", "--augment", "flip")
    assert other.status == USAGE
    assert "was made with --augment ('jitter',), not ('flip',)" in other.stderr
    whole = (cwd / "bands.npz").read_bytes()
    try:
        write_npz(cwd / "bands.npz", seed=5)
        changed = run(cwd, "tune", "--resume", "mine")
    finally:
        (cwd / "bands.npz").write_bytes(whole)
    assert changed.status == USAGE
    assert "was made with fingerprint" in changed.stderr and changed.stderr.count("Error: ") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--data", "broken.npz"), "broken.npz"),
        (("--data", "bands.npz", "--model", "resnet81"), "unknown model 'resnet81'; did you mean resnet18"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_study(
    run: Callable[..., Any], tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    write_npz(tmp_path / "bands.npz")
    (tmp_path / "broken.npz").write_text("no zip")
    ended = run(tmp_path, "tune", *args, *FAST)
    (error,) = [line for line in ended.stderr.splitlines() if not line.startswith("training ")]
    assert ended.status == USAGE
    assert error.startswith("Error: ") and message in error
    assert not list(tmp_path.glob("autocompress-runs/*/study.json"))


@pytest.mark.slow
def test_a_folder_of_images_with_a_network_of_torchvision(run: Callable[..., Any], tmp_path: Path) -> None:
    x, y = bands(90, 1)
    for i, (image, k) in enumerate(zip(x, y, strict=True)):
        file = tmp_path / "scans" / ("ill" if k else "well") / f"p{i // 3}_{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    (tmp_path / "scans" / "ill" / "p99_broken.png").write_text("no image")
    ended = run(
        tmp_path, "tune", "--data", "scans", "--model", "resnet18", "--image-size", "32", "--augment", "natural",
        "--balance", "sampler", "--group", r"(p\d+)_", "--max-drop", "0.9", "--train-epochs", "2", "--epochs", "1",
        "--trials", "1", "--batch-size", "16", "--name", "scans",
    )  # fmt: skip
    assert ended.status in (0, NOT_MET), ended.stderr
    assert "1 of 91 images cannot be read and were left out" in ended.stdout
    assert "no trained weights of resnet18 are on this machine" in ended.stdout
