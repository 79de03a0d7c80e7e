"""Labelled images in arrays: ``.npz`` files, torchvision's data sets, and scikit-learn's digits."""

import inspect
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from autocompress.reading.samples import PARTS, Found, Reading, Samples
from autocompress.reading.transforms import Size, resize

SCALES = {"uint8": 1 / 255, "uint16": 1 / 65535}  # factors that bring whole numbers to 0…1


def read_npz(path: Path, reading: Reading) -> Found:
    """Reads the arrays ``train_images`` and ``train_labels``, and those of val and test where they are there.

    Images of uint8 and uint16 are scaled to 0…1. All others are taken as they are: floats are so already, and of
    other whole numbers, such as int64, the type does not tell which value is white; a note says so.

    Raises:
        ValueError: If the file or an array in it cannot be used; the message says why.
    """
    arrays, names = _stored(path)
    parts: dict[str, Samples] = {}
    kinds: dict[str, str] = {}
    notes: list[str] = []
    for part in PARTS:
        images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
        if images is None and labels is None and part != "train":
            continue
        if images is None or labels is None:
            absent = f"{part}_{'images' if images is None else 'labels'}"
            raise ValueError(
                f"{path} has no {absent}; it has {', '.join(names) or 'nothing'}; save train_images and "
                "train_labels, and the same of val and test where they are divided already"
            )
        where = f"{path}: {part}"
        pixels = _pixels_of(images, where)
        parts[part] = Samples(_labels_of(labels, len(pixels), where), pixels)
        whole = "other whole numbers" if images.dtype.kind in "ui" else "float32"
        kind = images.dtype.name if images.dtype.name in SCALES else whole
        if kind == whole == "other whole numbers" and not 0 <= images.min() <= images.max() <= 1:
            notes.append(
                f"{part}_images are of type {images.dtype}, from {images.min()} to {images.max()}, and are taken "
                "as they are; as uint8 or uint16 they would be scaled to 0…1, by 255 or 65535"
            )
        kinds[part] = f"{kind} of shape {tuple(pixels.shape[1:])}"
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{part} {kind}" for part, kind in kinds.items())
        raise ValueError(
            f"{path}: the parts hold images of different kinds: {each} (channels, height, width); make them alike"
        )
    scale = SCALES.get(arrays["train_images"].dtype.name, 1.0)
    return _of_pixels(path.stem, parts, scale, reading.size, notes=notes[:1])  # all parts are alike


def _stored(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays of images and labels in a ``.npz`` file by name, and the names of all that is in it."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not what its name says: an .npz file, as numpy.savez_compressed writes it")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            wanted = [f"{part}_{what}" for part in PARTS for what in ("images", "labels")]
            arrays = {name: stored[name] for name in wanted if name in stored.files}
            names = list(stored.files)
        if odd := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{odd[0]} is no array")
    except ValueError as error:
        pickled = "pickle" in str(error).lower()
        why = "it holds Python objects, which could run code" if pickled else str(error).partition("\n")[0]
        raise ValueError(f"{path}: {why}; save plain numeric arrays with numpy.savez_compressed") from None
    except Exception as error:  # zip, zlib and numpy may raise anything on damaged bytes
        raise ValueError(f"{path} is not a readable .npz file ({type(error).__name__}: {error})") from None
    return arrays, names


def _pixels_of(images: NDArray[Any], where: str) -> Tensor:
    """Images as a tensor ``(n, channels, height, width)``: bytes stay bytes, other numbers become float32."""
    if images.dtype.kind not in "uif" and images.dtype != bool:
        raise ValueError(f"{where}_images are of type {images.dtype}; they must be numbers")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{where}_images are of shape {images.shape}; images are (n, height, width), or that with 1 or 3 "
            "channels"
        )
    if 0 in images.shape:
        raise ValueError(f"{where}_images are of shape {images.shape}: there is nothing in them")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        bad = ~np.isfinite(images).all(axis=(1, 2, 3))
        raise ValueError(
            f"{where}_images have pixels that are NaN or infinite, in {bad.sum()} of {len(bad)} images, the "
            f"first is number {bad.argmax()}; repair them or leave them out"
        )
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def _labels_of(labels: NDArray[Any], n: int, where: str) -> Tensor:
    """Labels as class numbers ``(n,)``, or as zeros and ones ``(n, labels)``, floating."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or len(labels) != n:
        raise ValueError(f"{where}_labels are of shape {labels.shape} for {n} images; they must be as many")
    if labels.dtype.kind not in "uib" and not (labels.dtype.kind == "f" and (labels == np.round(labels)).all()):
        raise ValueError(f"{where}_labels are of type {labels.dtype}; they must be whole numbers, from 0")
    if labels.size == 0:
        raise ValueError(f"{where}_labels are empty")
    if labels.ndim == 2:
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(f"{where}_labels have several columns, so each must be 0 or 1")
        return torch.from_numpy(labels.astype(np.float32))
    if labels.min() < 0 or labels.max() >= 100_000:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"{where}_labels go out of range, to {wrong:g}; classes are numbered from 0")
    return torch.from_numpy(labels.astype(np.int64))


def _of_pixels(
    name: str,
    parts: Mapping[str, Samples],
    scale: float,
    size: Size | None,
    classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Found:
    """The data in held arrays, resized if another size was asked for."""
    first = parts["train"]
    assert first.pixels is not None
    n = first.y.shape[1] if first.y.ndim == 2 else 1 + max(int(part.y.max()) for part in parts.values())
    if size is not None:
        parts = {
            part: replace(samples, pixels=resize(samples.pixels, size))
            for part, samples in parts.items()
            if samples.pixels is not None
        }
    shape = parts["train"].pixels
    assert shape is not None
    return Found(
        name=name,
        parts=parts,
        classes=tuple(classes) or tuple(str(k) for k in range(n)),
        channels=shape.shape[1],
        size=(shape.shape[2], shape.shape[3]),
        scale=scale,
        notes=tuple(notes),
    )


def read_torchvision(name: str, root: Path, reading: Reading) -> Found:
    """Reads a data set of torchvision from the folder ``root``; nothing is downloaded.

    Raises:
        ValueError: If there is no such data set, it is not in the folder, or it does not hold arrays.
    """
    from torchvision import datasets

    known = {key.lower(): key for key in datasets.__all__ if inspect.isclass(getattr(datasets, key))}
    if name.lower() not in known:
        raise ValueError(
            f"{name!r} is not a data set of torchvision, nor is {name}:{root} a file or folder; a factory is "
            "named by its file, as path/to/file.py:factory"
        )
    make = getattr(datasets, known[name.lower()])
    parameters = inspect.signature(make).parameters
    by_split = "split" in parameters
    parts: dict[str, Samples] = {}
    classes: tuple[str, ...] = ()
    for part in ("train", "test"):
        asked: dict[str, Any] = {"split": part} if by_split else {"train": part == "train"}
        if "download" in parameters:
            asked["download"] = False
        try:
            dataset = make(str(root), **asked)
        except Exception as error:  # each data set raises its own error when files are missing
            raise ValueError(
                f"{known[name.lower()]} is not in {root} ({str(error).partition(chr(10))[0]}); put it there "
                f"once, with torchvision.datasets.{known[name.lower()]}({str(root)!r}, download=True)"
            ) from None
        labels = np.asarray(getattr(dataset, "targets", getattr(dataset, "labels", None)))
        if not hasattr(dataset, "data") or labels.ndim == 0:
            raise ValueError(f"{known[name.lower()]} does not hold its images as an array; give an image folder")
        images = np.asarray(dataset.data)
        where = f"{name}: {part}"
        pixels = _pixels_of(images, where)
        parts[part] = Samples(_labels_of(labels, len(pixels), where), pixels)
        classes = tuple(map(str, getattr(dataset, "classes", ())))
    return _of_pixels(known[name.lower()], parts, 1 / 255, reading.size, classes)


def read_digits(reading: Reading) -> Found:
    """Reads the digits that come with scikit-learn, divided as in `autocompress.digits`."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    train, rest = train_test_split(range(len(labels)), train_size=0.5, stratify=labels, random_state=reading.seed)
    val, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=reading.seed)
    everything = Samples(torch.tensor(labels), pixels)
    parts = dict(zip(PARTS, map(everything.take, (train, val, test)), strict=True))
    return _of_pixels("digits", parts, 1 / 16, reading.size)
