"""Labelled images in files of their own: folders of classes, and tables of paths and labels."""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from autocompress.reading.images import BadImageError, decode, is_deep, shape_of, without_warnings
from autocompress.reading.samples import PARTS, Found, Reading, Samples
from autocompress.reading.transforms import Size
from autocompress.splits import row_hashes

PART_NAMES = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".gif")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_id")
LEVELS = 17  # of 256: the least level that the brightest 16-bit image must reach; 12 bits in 16 reach level 16
SPLIT_COLUMNS = ("split", "part", "subset")

A = TypeVar("A")
T = TypeVar("T")


def read_folder(path: Path, reading: Reading) -> Found:
    """Reads folders ``train``, ``val`` and ``test`` of class folders, or class folders alone.

    Raises:
        ValueError: If there are no such folders, or images that cannot be used; the message says why.
    """
    inside = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    parts = {PART_NAMES[p.name.lower()]: p for p in inside if p.name.lower() in PART_NAMES}
    if parts and "train" not in parts:
        raise ValueError(f"{path} has a folder {', '.join(p.name for p in parts.values())}, and no folder train")
    homes = parts or {"train": path}
    classes = sorted({p.name for home in homes.values() for p in _class_folders(home)})
    if len(classes) < 2:
        raise ValueError(
            f"{path} holds {len(classes)} folders of classes; it needs at least two, or train, val and test "
            "folders that hold them"
        )
    listed = {}
    for part, home in homes.items():
        files, labels = [], []
        for k, name in enumerate(classes):
            inside_class = _images_in(home / name)
            if not inside_class:
                raise ValueError(
                    f"the class {name!r} is empty: there is no image in {home / name}{_dicom(home / name)}"
                )
            files += inside_class
            labels += [k] * len(inside_class)
        listed[part] = (files, torch.tensor(labels), _groups(files, path, reading.group))
    return _of_files(path.resolve().name, listed, classes, reading)


def _class_folders(home: Path) -> list[Path]:
    return sorted(p for p in home.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith("."))


def _dicom(folder: Path) -> str:
    """A hint for the error about a folder without images, if there are DICOM files in it."""
    first = next(folder.rglob("*.dcm"), None) if folder.is_dir() else None
    return "; it holds DICOM files, convert them to PNG" if first else ""


def _groups(files: Sequence[Path], root: Path, pattern: str) -> tuple[str, ...]:
    """The group of each file: the match of the pattern in its path below ``root``; empty without a pattern."""
    if not pattern:
        return ()
    groups = []
    for file in files:
        text = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
        match = re.search(pattern, text)
        if not match:
            raise ValueError(
                f"the group {pattern!r} finds nothing in {text!r}; it must say whose image each file is"
            )
        groups.append(match[1] if match.re.groups and match[1] is not None else match[0])
    return tuple(groups)


def read_csv(path: Path, reading: Reading) -> Found:
    """Reads a table with a header: a column of paths, one or more of labels, and perhaps ``split``.

    Paths are relative to the table. A single column of labels holds classes by name or number. Several columns
    hold 0 or 1 each, and a sample may have several labels.

    Raises:
        ValueError: If a column is missing, or a line or an image cannot be used; the message says why.
    """
    header, rows = _table(path)
    lowered = [name.strip().lower() for name in header]
    path_column = next((lowered.index(name) for name in PATH_COLUMNS if name in lowered), 0)
    split_column = next((lowered.index(name) for name in SPLIT_COLUMNS if name in lowered), None)
    group_column = header.index(reading.group) if reading.group in header else None
    for name in reading.labels:
        if name not in header:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(header)}")
    taken = {path_column, split_column, group_column}
    label_columns = [header.index(name) for name in reading.labels] or [
        i for i in range(len(header)) if i not in taken
    ]
    if not label_columns:
        other = next(
            (f"; columns are parted by commas, not by {mark!r}" for mark in ";\t|" if mark in header[0]), ""
        )
        raise ValueError(f"{path} has no column of labels beside {header[path_column]!r}{other}")
    y, classes = _table_labels(path, header, rows, label_columns)
    files = [path.parent / row[path_column].strip() for row in rows]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{path} names {len(absent)} files that are not there, the first is {absent[0]}")
    if twice := [file for file, lines in Counter(map(os.path.normpath, files)).items() if lines > 1]:
        raise ValueError(
            f"{path} names {len(twice)} files more than once, the first is {twice[0]}; name each once, or it "
            "is in train and test"
        )
    if group_column is not None:
        groups = tuple(row[group_column] for row in rows)
    else:
        groups = _groups(files, path.parent, reading.group)
    listed = {}
    for part, chosen in _table_parts(path, rows, split_column).items():
        of_part = tuple(groups[i] for i in chosen) if groups else ()
        listed[part] = ([files[i] for i in chosen], y[torch.tensor(chosen)], of_part)
    return _of_files(path.stem, listed, classes, reading)


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a .csv file, each of as many values."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a .csv table in UTF-8: {error}; save it as one") from None
    if any(separator in value for row in lines for value in row for separator in "\r\n"):
        raise ValueError(f"{path} has a value that spans lines; a quotation mark may be missing")
    if len(lines) < 2:
        raise ValueError(f"{path} has {len(lines)} lines; it needs a header and a line a sample")
    header, rows = [name.strip() for name in lines[0]], lines[1:]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has two columns of the same name: {', '.join(header)}")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} values for {len(header)} columns")
        if any("\0" in value for value in row):
            raise ValueError(f"{path}, line {number}: it has a zero byte, so it is no text")
    return header, rows


def _table_labels(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]
) -> tuple[Tensor, list[str]]:
    """The targets in these columns, see `Samples.y`, and the names of the classes."""
    if len(columns) == 1:
        values = [row[columns[0]].strip() for row in rows]
        empty = [number for number, value in enumerate(values, 2) if not value]
        if empty:
            raise ValueError(f"{path}, line {empty[0]}: it has no {header[columns[0]]!r}")
        distinct = set(values)
        by_number = all(re.fullmatch(r"\d{1,9}", value) for value in distinct)
        classes = sorted(distinct, key=(lambda v: (int(v), v)) if by_number else None)
        place = {name: k for k, name in enumerate(classes)}
        return torch.tensor([place[value] for value in values]), classes
    meaning = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
    for number, row in enumerate(rows, 2):
        for i in columns:
            if row[i].strip() not in meaning:
                raise ValueError(
                    f"{path}, line {number}: {header[i]!r} is {row[i]!r}; where there are several columns of "
                    f"labels, here {', '.join(header[k] for k in columns)}, each is 0 or 1 (--label names the "
                    "columns that are labels)"
                )
    y = torch.tensor([[meaning[row[i].strip()] for i in columns] for row in rows])
    return y, [header[i] for i in columns]


def _table_parts(path: Path, rows: Sequence[Sequence[str]], column: int | None) -> dict[str, list[int]]:
    """The indices of each part's rows, by the names in a column; without one all are of train."""
    if column is None:
        return {"train": list(range(len(rows)))}
    parts: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        name = row[column].strip().lower()
        if name not in PART_NAMES:
            raise ValueError(f"{path}, line {i + 2}: the split {row[column]!r} is none of train, val and test")
        parts.setdefault(PART_NAMES[name], []).append(i)
    if "train" not in parts:
        raise ValueError(f"{path} has no line whose split is train")
    return {part: parts[part] for part in PARTS if part in parts}


Listed = Mapping[str, tuple[Sequence[Path], Tensor, tuple[str, ...]]]  # files, targets and groups, by part


def _of_files(name: str, listed: Listed, classes: Sequence[str], reading: Reading) -> Found:
    """Opens each file, leaves out those that cannot be read, and holds the images if they fit in memory."""
    n = sum(len(files) for files, _, _ in listed.values())
    reading.progress(f"looking at {n:,} images")
    bad: list[BadImageError] = []
    seen: dict[str, list[tuple[int, tuple[Size, int]]]] = {}
    for part, (files, _, _) in listed.items():
        shapes = _in_threads(shape_of, files)
        bad += [shape for shape in shapes if isinstance(shape, BadImageError)]
        seen[part] = [(i, s) for i, s in enumerate(shapes) if not isinstance(s, BadImageError)]
    kinds = Counter(shape for shapes in seen.values() for _, shape in shapes)
    _raise_if(bad, n, reading.strict, kinds)
    channels = max(channels for _, channels in kinds)
    size = reading.size or _one_size([size for (size, _), _ in kinds.most_common()])
    held = n * channels * size[0] * size[1] <= reading.held_bytes
    reading.progress(f"decoding {n:,} images" if held else f"checking {n:,} images, which are too large to hold")
    parts = {}
    for part, (files, y, groups) in listed.items():
        samples = Samples(y, None, tuple(files), groups).take([i for i, _ in seen[part]])
        parts[part], unreadable = _decoded(samples, size, channels, held)
        bad += unreadable
    _raise_if(bad, n, reading.strict, kinds)
    notes = (f"{len(bad)} of {n:,} images cannot be read and were left out, the first is {bad[0]}",) if bad else ()
    return Found(name, parts, tuple(classes), channels, size, 1 / 255, notes)


def _raise_if(bad: Sequence[BadImageError], n: int, strict: bool, kinds: Counter[Any]) -> None:
    if bad and (strict or len(bad) == n or not kinds):
        raise ValueError(f"{len(bad)} of {n:,} images cannot be read, the first is {bad[0]}")


def _one_size(sizes: Sequence[Size]) -> Size:
    """The size of all images; an error if they differ."""
    distinct = list(dict.fromkeys(sizes))
    if len(distinct) > 1:
        shown = " and ".join(f"{height}x{width}" for height, width in distinct[:2])
        raise ValueError(
            f"the images are of {len(distinct)} sizes, such as {shown}; say with --image-size what "
            f"to bring them to"
        )
    return distinct[0]


def _decoded(samples: Samples, size: Size, channels: int, held: bool) -> tuple[Samples, list[BadImageError]]:
    """The samples that can be decoded, with pixels if they are to be held, and the errors of the others."""
    pixels = torch.empty((len(samples) if held else 0, channels, *size), dtype=torch.uint8)
    peaks = torch.zeros(len(samples), dtype=torch.uint8)
    hashes = np.zeros(len(samples), dtype=np.uint64)

    def load(i: int) -> int:
        image = decode(samples.files[i], size, channels)
        peaks[i] = image.max()
        if held:
            pixels[i] = image
        else:
            hashes[i] = row_hashes(image[None])[0]
        return i

    done = _in_threads(load, range(len(samples)))
    bad = [error for error in done if isinstance(error, BadImageError)]
    good = [i for i in done if not isinstance(i, BadImageError)]
    _refuse_dim([samples.files[i] for i in good], peaks[good])
    held_samples = replace(samples, pixels=pixels if held else None, hashes=None if held else hashes)
    return (held_samples.take(good) if bad else held_samples), bad


def _refuse_dim(files: Sequence[Path], peaks: Tensor) -> None:
    """Refuses images of more than 8 bits per pixel that are almost black when scaled to 8 bits."""
    brightest = int(peaks.max()) if len(peaks) else LEVELS
    if brightest < LEVELS and (deep := next(filter(is_deep, files), None)):
        raise ValueError(
            f"{deep} and the others have more than 8 bits a pixel and use the lowest: of the 256 levels that 0 to "
            f"65535 become, {brightest + 1}; bring them to 0 to 65535, or to 8 bits"
        )


def _in_threads(do: Callable[[A], T], items: Sequence[A]) -> list[T | BadImageError]:
    """The results of ``do``, or its `BadImageError`, in order; Pillow releases Python's lock while it decodes."""

    def attempt(item: A) -> T | BadImageError:
        try:
            return do(item)
        except BadImageError as error:
            return error

    with without_warnings(), ThreadPoolExecutor(4) as pool:
        return list(pool.map(attempt, items))
