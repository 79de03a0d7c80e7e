"""Reading the data that ``--data`` names, with an error in one line for data that cannot be used."""

from pathlib import Path

from autocompress.reading.array_readers import read_digits, read_npz, read_torchvision
from autocompress.reading.file_readers import read_csv, read_folder
from autocompress.reading.samples import Found, Reading, divide, with_classes_checked


def read(spec: str, reading: Reading) -> Found:
    """Reads the data that ``spec`` names, divided into train, val and test.

    Args:
        spec: A ``.npz`` file in MedMNIST's layout, a folder of images, a ``.csv`` table of paths and labels,
            ``name:folder`` for a data set of torchvision in that folder, or ``digits``.
        reading: How to read it.

    Raises:
        ValueError: If it does not exist, or cannot be used as it is; the message says why.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() != ".csv" and reading.labels:
        raise ValueError(
            f"--label {reading.labels[0]} is a column of a .csv table, which {spec!r} is not; leave it out"
        )
    if reading.group and path.suffix.lower() != ".csv" and not path.is_dir():
        raise ValueError(
            f"--group {reading.group} looks at paths of images or a column of a table, and {spec!r} has neither: "
            "leave it out, and see to it yourself that nobody is in two parts"
        )
    if spec == "digits":
        return read_digits(reading)
    if path.is_dir():
        found = read_folder(path, reading)
    elif path.suffix.lower() == ".npz":
        found = read_npz(_existing(path), reading)
    elif path.suffix.lower() == ".csv":
        found = read_csv(_existing(path), reading)
    elif ":" in spec:
        name, _, root = spec.partition(":")
        found = read_torchvision(name, Path(root).expanduser(), reading)
    else:
        raise ValueError(
            f"{spec!r} is not data: there is no such folder, and it is no .npz or .csv file, name:folder of a "
            "data set of torchvision, or file.py:factory"
        )
    return with_classes_checked(divide(found, reading))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    return path
