import io
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autocompress.reading.readers import read
from autocompress.reading.samples import Found, Reading

SIZE = (6, 5)  # height, width
RNG = np.random.default_rng(0)


def image(file: Path, value: int = 100, size: tuple[int, int] = SIZE, mode: str = "L") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 50, size=size, dtype=np.uint8) + np.uint8(value)
    Image.fromarray(pixels).convert(mode).save(file)
    return file


def class_folders(root: Path, n: int = 12, classes: tuple[str, ...] = ("ill", "well"), mode: str = "L") -> Path:
    for k, name in enumerate(classes):
        for i in range(n):
            image(root / name / f"patient{i // 2}_{i}.png", 100 * k, mode=mode)
    return root


def arrays(n: int = 12, classes: int = 2, **changes: np.ndarray) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for part in ("train", "val", "test"):
        made[f"{part}_images"] = RNG.integers(0, 256, size=(n, *SIZE), dtype=np.uint8)
        made[f"{part}_labels"] = (np.arange(n) % classes).astype(np.uint8)[:, None]
    return made | changes


def npz(folder: Path, **contents: np.ndarray) -> str:
    np.savez(folder / "data.npz", **contents)
    return str(folder / "data.npz")


def sizes(found: Found) -> dict[str, int]:
    return {part: len(samples) for part, samples in found.parts.items()}


def check_refused(spec: str, message: str, reading: Reading | None = None) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(spec, reading or Reading())
    assert "\n" not in str(refused.value)


# Arrays


def test_the_layout_of_medmnist(tmp_path: Path) -> None:
    stored = arrays()
    found = read(npz(tmp_path, **stored), Reading())
    assert (found.name, found.classes, found.channels, found.size) == ("data", ("0", "1"), 1, SIZE)
    assert sizes(found) == {"train": 12, "val": 12, "test": 12}
    for part, samples in found.parts.items():
        assert samples.pixels.dtype == torch.uint8
        np.testing.assert_array_equal(samples.pixels[:, 0].numpy(), stored[f"{part}_images"])
        assert samples.y.tolist() == stored[f"{part}_labels"][:, 0].tolist()


@pytest.mark.parametrize("shape", [(12, *SIZE, 3), (12, 3, *SIZE)])
def test_colour_comes_in_either_order(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = {f"{part}_images": np.zeros(shape, np.uint8) for part in ("train", "val", "test")}
    found = read(npz(tmp_path, **arrays(**images)), Reading())
    assert (found.channels, found.size) == (3, SIZE)


def test_several_columns_are_several_labels(tmp_path: Path) -> None:
    labels = {f"{part}_labels": np.tile([[0, 1, 1], [1, 0, 1]], (6, 1)) for part in ("train", "val", "test")}
    found = read(npz(tmp_path, **arrays(**labels)), Reading())
    assert found.parts["val"].y.shape == (12, 3) and found.parts["val"].y.is_floating_point()
    assert found.classes == ("0", "1", "2")


def test_parts_that_are_not_there_are_taken_from_train_class_by_class(tmp_path: Path) -> None:
    stored = {name: value for name, value in arrays(n=100, classes=4).items() if name.startswith("train")}
    found = read(npz(tmp_path, **stored), Reading(shares=(0.6, 0.2, 0.2)))
    assert sizes(found) == {"train": 60, "val": 20, "test": 20}
    assert torch.bincount(found.parts["val"].y).tolist() == [5, 5, 5, 5]
    assert "divided with seed 0: train 60, val 20, test 20" in found.notes[-1]
    rows = torch.cat([samples.pixels.flatten(1) for samples in found.parts.values()])
    assert sorted(map(tuple, rows.tolist())) == sorted(
        map(tuple, stored["train_images"].reshape(100, -1).tolist())
    )


def test_images_are_brought_to_a_size(tmp_path: Path) -> None:
    found = read(npz(tmp_path, **arrays()), Reading(size=(12, 20)))
    assert found.size == (12, 20) and found.parts["test"].pixels.shape == (12, 1, 12, 20)


BAD_NAN = np.zeros((12, *SIZE), np.float32)
BAD_NAN[4, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_images": BAD_NAN}, "val_images have pixels that are NaN or infinite, in 1 of 12 .* number 4"),
        ({"train_labels": np.zeros(12, int)}, "train has no sample of class 1: the network could not learn it"),
        (
            {f"{part}_labels": np.zeros(12, int) for part in ("train", "val", "test")},
            "holds one class; there must be two",
        ),
        ({"test_labels": np.arange(12) - 1}, "test_labels go out of range, to -1"),
        ({"test_labels": np.arange(12) * 10**9}, "test_labels go out of range"),
        ({"train_labels": np.arange(12) + 0.5}, "train_labels are of type float64; they must be whole numbers"),
        ({"train_labels": np.zeros(11, int)}, r"train_labels are of shape \(11,\) for 12 images"),
        ({"train_images": np.zeros((12, 6, 6, 6), np.uint8)}, r"train_images are of shape \(12, 6, 6, 6\)"),
        (
            {"train_images": np.zeros((12, 4, 4), np.uint8)},
            r"different kinds: train uint8 of shape \(1, 4, 4\), val ",
        ),
        (  # 16-bit numbers are scaled to 0…1, which floats are already
            {
                **{f"{part}_images": np.ones((12, *SIZE), np.uint16) for part in ("train", "test")},
                "val_images": np.ones((12, *SIZE), np.float32),
            },
            r"different kinds: train uint16 of shape .*, val float32 of shape .*, test uint16",
        ),
        (  # other whole numbers are not scaled
            {**{f"{part}_images": np.ones((12, *SIZE), int) for part in ("train", "val")}},
            r"different kinds: train other whole numbers of shape .*, test uint8 of shape",
        ),
        (
            {
                "train_images": np.full((12, *SIZE), 255),
                **{f"{part}_images": np.ones((12, *SIZE), np.float32) for part in ("val", "test")},
            },
            r"different kinds: train other whole numbers of shape .*, val float32",
        ),
        ({"train_images": np.array(["a"] * 12)}, "train_images are of type <U1; they must be numbers"),
        ({"train_images": np.zeros((12, 0, 5), np.uint8)}, "there is nothing in them"),
        ({"train_labels": np.tile([0, 2], (12, 1))}, "have several columns, so each must be 0 or 1"),
        ({"train_images": np.array([None] * 12)}, "it holds Python objects, which could run code"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    check_refused(npz(tmp_path, **arrays(**changes)), message)


@pytest.mark.parametrize(
    ("kind", "scale"), [("uint8", 255), ("uint16", 65535), ("int64", 1), ("int16", 1), ("float32", 1)]
)
def test_what_is_not_scaled_to_0_to_1_is_said(tmp_path: Path, kind: str, scale: int) -> None:
    images = {f"{part}_images": np.full((12, *SIZE), 200, kind) for part in ("train", "val", "test")}
    found = read(npz(tmp_path, **arrays(**images)), Reading())
    assert found.scale == 1 / scale and found.parts["val"].pixels.max() == 200
    said = f"train_images are of type {kind}, from 200 to 200, and are taken as they are; as uint8 or uint16 they "
    assert [note[: len(said)] for note in found.notes] == [said] * kind.startswith("int")
    zeros_and_ones = {f"{part}_images": np.ones((12, *SIZE), kind) for part in ("train", "val", "test")}
    assert read(npz(tmp_path, **arrays(**zeros_and_ones)), Reading()).notes == ()


def test_an_npz_that_lacks_something_says_what_it_has(tmp_path: Path) -> None:
    check_refused(npz(tmp_path, images=np.zeros(3)), "has no train_images; it has images")
    check_refused(
        npz(tmp_path, **{k: v for k, v in arrays().items() if k != "val_labels"}),
        "has no val_labels; it has train_",
    )


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("no zip")
    check_refused(str(tmp_path / "data.npz"), "data.npz")
    (tmp_path / "data.csv").write_bytes(b"\xff\xfe\x00bytes")
    check_refused(str(tmp_path / "data.csv"), "is not a .csv table in UTF-8")
    check_refused(str(tmp_path / "absent.npz"), "there is no file")
    check_refused(str(tmp_path / "absent"), "is not data: there is no such folder")


# Folders


def test_class_folders_are_divided(tmp_path: Path) -> None:
    found = read(str(class_folders(tmp_path / "cells", 20)), Reading())
    assert (found.name, found.classes, found.channels, found.size) == ("cells", ("ill", "well"), 1, SIZE)
    assert sizes(found) == {"train": 28, "val": 6, "test": 6}
    for samples in found.parts.values():
        bright = samples.pixels.float().mean(dim=(1, 2, 3)) > 90
        assert torch.equal(bright.long(), samples.y)
        assert [file.parent.name for file in samples.files] == [found.classes[k] for k in samples.y]


def test_folders_of_parts_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, n in (("Train", 5), ("valid", 3), ("test", 2)):
        class_folders(tmp_path / part, n, mode="RGB")
    found = read(str(tmp_path), Reading(size=(4, 4)))
    assert sizes(found) == {"train": 10, "val": 6, "test": 4}
    assert (found.channels, found.parts["train"].pixels.shape) == (3, (10, 3, 4, 4))
    assert found.notes == ()


def test_a_patient_is_in_one_part(tmp_path: Path) -> None:
    found = read(str(class_folders(tmp_path, 40)), Reading(group=r"(patient\d+)_"))
    patients = [set(samples.groups) for samples in found.parts.values()]
    assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])
    assert sum(map(len, patients)) == 20
    assert 0.5 < len(found.parts["train"]) / 80 < 0.9
    assert "divided by group" in found.notes[0]


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    class_folders(tmp_path, 12)
    (tmp_path / "ill" / "text.png").write_text("not an image")
    whole = image(tmp_path / "ill" / "cut.jpg", size=(60, 60)).read_bytes()
    (tmp_path / "ill" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "ill" / "notes.txt").write_text("no image by its name")
    found = read(str(tmp_path), Reading(size=SIZE))
    assert sum(sizes(found).values()) == 24
    assert "2 of 26 images cannot be read and were left out, the first is" in found.notes[0]
    check_refused(str(tmp_path), "1 of 26 images cannot be read, the first is .*text.png", Reading(strict=True))


def test_sixteen_bits_are_brought_to_eight(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(4):
            file = tmp_path / name / f"{i}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full(SIZE, 257 * (100 + i), np.uint16)).save(file)
    found = read(str(tmp_path), Reading())
    values = torch.cat([samples.pixels.flatten() for samples in found.parts.values()])
    assert sorted(set(values.tolist())) == [100, 101, 102, 103]


def test_threads_that_read_leave_the_filters_of_warnings_as_they_were(tmp_path: Path) -> None:
    class_folders(tmp_path, 100)
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        read(str(tmp_path), Reading())
    finally:
        sys.setswitchinterval(interval)
    assert list(warnings.filters) == before


def test_what_is_too_large_to_hold_stays_in_its_files(tmp_path: Path) -> None:
    class_folders(tmp_path, 12)
    (tmp_path / "ill" / "bad.png").write_text("not an image")
    told: list[str] = []
    found = read(str(tmp_path), Reading(held_bytes=100, progress=told.append))
    assert all(samples.pixels is None for samples in found.parts.values())
    assert sum(len(samples.files) for samples in found.parts.values()) == 24
    assert any("too large to hold" in what for what in told)


def empty_class(root: Path) -> None:
    class_folders(root)
    (root / "rare").mkdir()


def only_dicom(root: Path) -> None:
    class_folders(root)
    (root / "rare").mkdir()
    (root / "rare" / "scan.dcm").write_bytes(b"")


def two_sizes(root: Path) -> None:
    class_folders(root)
    image(root / "ill" / "large.png", size=(9, 9))


def all_bad(root: Path) -> None:
    for name in ("a", "b"):
        (root / name).mkdir()
        (root / name / "x.png").write_text("no")


def no_train(root: Path) -> None:
    class_folders(root / "val")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_class, "the class 'rare' is empty: there is no image in .*rare"),
        (only_dicom, "it holds DICOM files, convert them to PNG"),
        (two_sizes, "the images are of 2 sizes, such as 6x5 and 9x9; say with --image-size"),
        (all_bad, "2 of 2 images cannot be read, the first is"),
        (no_train, "has a folder val, and no folder train"),
        (lambda root: class_folders(root, 2), "the class 'ill' has 2 samples; at least 3 are needed"),
        (lambda root: class_folders(root, classes=("one",)), "holds 1 folders of classes; it needs at least two"),
        (lambda root: None, "holds 0 folders of classes"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    check_refused(str(tmp_path), message)


def test_options_that_the_data_has_no_use_for_are_refused(tmp_path: Path) -> None:
    spec = npz(tmp_path, **arrays())
    check_refused(
        spec, "--group patient looks at paths of images or a column of a table", Reading(group="patient")
    )
    check_refused(spec, "--label grade is a column of a .csv table", Reading(labels=("grade",)))
    check_refused(spec, "--split is of no use here", Reading(shares=(0.6, 0.2, 0.2)))


@pytest.mark.parametrize("parts", [("train", "val", "test"), ("train", "test")])
def test_a_patient_in_two_parts_that_were_given_is_refused(tmp_path: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        class_folders(tmp_path / part, 8)
    check_refused(
        str(tmp_path), r"groups in train are in (val|test) as well, such as 'patient", Reading(group=r"patient\d")
    )


def test_a_group_that_finds_nothing_or_is_no_pattern(tmp_path: Path) -> None:
    class_folders(tmp_path)
    check_refused(str(tmp_path), "finds nothing in 'ill/patient0_0.png'", Reading(group="case"))
    check_refused(str(tmp_path), "there are 1 groups; at least 3", Reading(group="patient"))
    with pytest.raises(ValueError, match="is not a regular expression"):
        Reading(group="(")


# Tables


def table(root: Path, *lines: str, n: int = 12) -> str:
    for i in range(n):
        image(root / "images" / f"{i}.png")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return str(root / "labels.csv")


def test_a_table_of_paths_and_classes(tmp_path: Path) -> None:
    rows = [f"images/{i}.png,{'mel' if i % 3 == 0 else 'nv'},p{i}" for i in range(12)]
    spec = table(tmp_path, "image,dx,patient", *rows)
    found = read(spec, Reading(group="patient", shares=(0.4, 0.3, 0.3)))
    assert (found.name, found.classes) == ("labels", ("mel", "nv"))
    assert sum(sizes(found).values()) == 12
    for samples in found.parts.values():
        assert [found.classes[k] for k in samples.y] == [
            "mel" if int(file.stem) % 3 == 0 else "nv" for file in samples.files
        ]


def test_a_table_says_its_own_split_and_several_labels(tmp_path: Path) -> None:
    rows = [f"images/{i}.png,{i % 2},{(i // 2) % 2},{('train', 'valid', 'test')[i // 4]}" for i in range(12)]
    found = read(table(tmp_path, "path,effusion,mass,split", *rows), Reading())
    assert found.classes == ("effusion", "mass") and sizes(found) == {"train": 4, "val": 4, "test": 4}
    assert found.parts["train"].y.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    one = read(str(tmp_path / "labels.csv"), Reading(labels=("mass",)))
    assert one.classes == ("0", "1") and one.parts["test"].y.tolist() == [0, 0, 1, 1]


def test_classes_by_number_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = [f"images/{i}.png,{(2, 10, 1)[i % 3]}" for i in range(12)]
    found = read(table(tmp_path, "path,grade", *rows), Reading(shares=(0.4, 0.3, 0.3)))
    assert found.classes == ("1", "2", "10")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,label"], "has 1 lines; it needs a header"),
        (["path", "images/1.png"], "has no column of labels beside 'path'$"),
        (["path;label", "images/1.png;a"], "beside 'path;label'; columns are parted by commas, not by ';'"),
        (
            ["path,label", "images/1.png,a", "./images/1.png,b"],
            "names 1 files more than once, the first is .*1.png",
        ),
        (["path,label", "images/1.png"], "line 2: 1 values for 2 columns"),
        (["path,label", "images/1.png,a", "images/2.png,"], "line 3: it has no 'label'"),
        (["path,label", "images/1.png,a", "images/99.png,b"], "names 1 files that are not there"),
        (
            ["path,a,b", "images/1.png,0,2"],
            "line 2: 'b' is '2'; where there are several columns of labels, here a, b",
        ),
        (["path,label,split", "images/1.png,a,other"], "line 2: the split 'other' is none of"),
        (["path,label,split", "images/1.png,a,val"], "has no line whose split is train"),
        (["path,path", "images/1.png,a"], "two columns of the same name"),
        (["path,label", 'images/1.png,"a'], "is not a .csv table"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    check_refused(table(tmp_path, *lines, n=3), message)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    spec = table(tmp_path, "path,label", "images/1.png,a", n=2)
    check_refused(spec, "has no column 'dx'; it has path, label", Reading(labels=("dx",)))


def test_a_split_that_leaves_a_class_out_is_refused_in_plain_words(tmp_path: Path) -> None:
    rows = [f"images/{i}.png,{'ab'[i % 2]}" for i in range(6)]
    check_refused(
        table(tmp_path, "path,label", *rows), "6 samples of 2 classes are too few to take 15% away .* add"
    )


@pytest.mark.parametrize("held_bytes", [10**9, 0])
@pytest.mark.parametrize(("kind", "suffix"), [(np.float32, "tif"), (np.uint16, "png")])
def test_deep_images_that_would_lose_nearly_all_their_levels_are_refused(
    tmp_path: Path, kind: type, suffix: str, held_bytes: int
) -> None:
    """Values from 0 to 1, or 12 bits in 16."""
    most = 1 if kind is np.float32 else 4095
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(10):
            values = np.linspace(0, most, 64).reshape(8, 8).astype(kind)
            Image.fromarray(values).save(tmp_path / name / f"{k}{i}.{suffix}")
    said = "more than 8 bits a pixel and use the lowest: .*; bring them to 0 to 65535, or to 8 bits"
    check_refused(str(tmp_path), said, Reading(held_bytes=held_bytes))


# Others


def test_the_digits_are_those_of_the_default_task() -> None:
    found = read("digits", Reading())
    assert sizes(found) == {"train": 898, "val": 449, "test": 450}
    assert (found.size, found.scale, found.channels) == ((8, 8), 1 / 16, 1)


def test_a_data_set_of_torchvision_is_never_downloaded(tmp_path: Path) -> None:
    check_refused(
        f"cifar10:{tmp_path}", "CIFAR10 is not in .*; put it there once, with torchvision.datasets.CIFAR10"
    )
    check_refused(f"nonsense:{tmp_path}", "'nonsense' is not a data set of torchvision")
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_of_torchvision_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 20)):
        images = RNG.integers(0, 256, size=(n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        header = (2051).to_bytes(4, "big") + b"".join(k.to_bytes(4, "big") for k in images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            (2049).to_bytes(4, "big") + n.to_bytes(4, "big") + labels.tobytes()
        )
    found = read(f"fashionmnist:{tmp_path}", Reading(shares=(0.6, 0.2, 0.2)))
    assert found.name == "FashionMNIST" and found.classes[0] == "T-shirt/top"
    assert sizes(found) == {"train": 45, "val": 15, "test": 20}


# Anything at all


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode())))
def test_no_table_makes_a_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"any\.csv|images"):
        read(str(tmp_path / "any.csv"), Reading())


CELLS = st.sampled_from(
    ["0", "1", "a", "images/0.png", "", "train", "val", "nan", "-1", '"', "é", "path", "split"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=6))
def test_no_table_of_likely_cells_makes_anything_but_data_or_one_line(
    tmp_path: Path, rows: list[list[str]]
) -> None:
    table(tmp_path, *(",".join(row) for row in rows), n=1)
    _either_data_or_one_line(str(tmp_path / "labels.csv"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3000), flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8))
def test_no_damaged_npz_makes_a_traceback(tmp_path: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, **arrays())
    damaged = bytearray(whole.getvalue())
    for at, value in flips:
        damaged[at % len(damaged)] = value
    (tmp_path / "any.npz").write_bytes(bytes(damaged[: len(damaged) - cut % len(damaged)]))
    _either_data_or_one_line(str(tmp_path / "any.npz"))


def _either_data_or_one_line(spec: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read(spec, Reading(shares=(0.4, 0.3, 0.3)))
    except ValueError as error:
        assert re.fullmatch(r"[^\n]+", str(error))
    else:
        assert set(found.parts) == {"train", "val", "test"} and all(len(part) for part in found.parts.values())


def test_an_npz_of_another_program_s_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as file:
        file.writestr("train_images.npy", b"not an array")
        file.writestr("train_labels.npy", b"not an array")
    check_refused(str(tmp_path / "data.npz"), "data.npz")
