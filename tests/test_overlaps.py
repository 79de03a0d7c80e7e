"""Samples that two parts of the data have in common are said, in whatever form the data is given."""

from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autocompress as ac
from autocompress import own_task
from autocompress.reading.samples import PARTS
from autocompress.splits import row_hashes

OF_VAL = "of 8 different val samples {} are in train as well: the search is not on data held out from training"
OF_TEST = "of 8 different test samples {} as well: the verdict is not on data held out"


def images(n: int = 24) -> np.ndarray:
    """Different images, of an odd number of bytes."""
    return np.random.default_rng(0).integers(0, 256, size=(n, 5, 5, 1), dtype=np.uint8)


def parts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """8 samples a part: 3 of val are in train, 2 of test in train and 1 in val."""
    x, y = images(), np.arange(8) % 2
    train, val, test = x[:8].copy(), x[8:16].copy(), x[16:].copy()
    val[:3], test[2:4], test[7] = train[2:5], train[6:], val[5]
    return {"train": (train, y), "val": (val, y), "test": (test, y)}


SAID = (OF_VAL.format(3), OF_TEST.format("2 are in train and 1 is in val"))


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 2))


def said(task: ac.Task) -> tuple[str, ...]:
    return tuple(note for note in task.notes if "as well" in note)


def tensors() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.from_numpy(x).float(), torch.from_numpy(y)) for x, y in parts().values()]


def test_of_tensors_it_is_said_how_many_samples_are_in_two_parts() -> None:
    train, val, test = tensors()
    assert said(ac.Task(model(), train, val, test)) == SAID
    assert said(ac.Task(model(), train, train, val)) == (
        OF_VAL.format(8),
        OF_TEST.format("3 are in train and 3 are in val"),
    )
    x = torch.from_numpy(images()).float()
    assert said(ac.Task(model(), *((x[8 * i : 8 * i + 8], train[1]) for i in range(3)))) == ()


def test_loaders_are_not_read_for_it() -> None:
    train, val, test = (DataLoader(TensorDataset(*part)) for part in tensors())
    assert said(ac.Task(model(), train, val, test)) == ()


@pytest.mark.parametrize("augment", ["none", "flip"])  # augmented images are held as bytes, the others as floats
def test_of_an_npz(tmp_path: Path, augment: str) -> None:
    arrays = {
        f"{part}_{what}": a
        for part, pair in parts().items()
        for what, a in zip(("images", "labels"), pair, strict=True)
    }
    np.savez(tmp_path / "data.npz", **arrays)
    task = ac.make_task(data=str(tmp_path / "data.npz"), train_epochs=0, augment=augment)
    assert said(task) == SAID


@pytest.mark.parametrize("held_bytes", [0, 10**6])
def test_of_files_whatever_their_names_and_formats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    for (part, (x, y)), suffix in zip(parts().items(), (".png", ".bmp", ".tif"), strict=True):
        for i, (pixels, k) in enumerate(zip(x, y, strict=True)):
            file = tmp_path / "scans" / part / f"class{k}" / f"{part}{i}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(file)
    monkeypatch.setattr(own_task, "Reading", partial(own_task.Reading, held_bytes=held_bytes))
    task = ac.make_task(data=str(tmp_path / "scans"), train_epochs=0)
    assert all(hasattr(getattr(task, part), "files") is (held_bytes == 0) for part in PARTS)
    assert said(task) == SAID


@pytest.mark.parametrize("n_bytes", [1, 7, 8, 9, 16, 25, 32])
def test_images_that_differ_in_one_or_two_bytes_have_different_hashes(n_bytes: int) -> None:
    base = np.random.default_rng(1).integers(0, 256, size=n_bytes, dtype=np.uint8)
    rows = [base]
    for i, j in combinations(range(-1, n_bytes), 2):
        for change in range(1, 256, 7):
            row = base.copy()
            row[j] ^= change
            row[i] ^= 128 * (i >= 0)
            rows.append(row)
    distinct = np.unique(np.array(rows), axis=0)
    hashes = row_hashes(torch.from_numpy(distinct))
    assert len(np.unique(hashes)) == len(distinct)
    assert row_hashes(torch.from_numpy(distinct[::-1].copy())[:, None]).tolist() == hashes[::-1].tolist()
