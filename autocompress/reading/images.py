"""Splits of images: decoded and held in memory, or read from files by worker processes where they do not fit."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autocompress.reading.transforms import Preprocessing, Size, augment, resize, with_channels
from autocompress.splits import Batch, Hashes, as_bytes, row_hashes

CPU = torch.device("cpu")
Sampled = tuple[Tensor, Tensor]  # indices of samples, and a seed for each


@dataclass(frozen=True)
class Sampling:
    """How a split is served.

    Attributes:
        batch_size: Samples in a full batch.
        augmentations: The augmentations of training samples, see `augment`.
        weights: How often each sample is drawn for training, relative to the others; None for once each.
        workers: The number of processes that read files; 0 for none.
        share: The first sample and the step of those that this process takes of each training batch, where several
            processes divide it.
    """

    batch_size: int = 64
    augmentations: tuple[str, ...] = ()
    weights: Tensor | None = None
    workers: int = 0
    share: tuple[int, int] = (0, 1)

    def order(self, n: int, generator: torch.Generator | None) -> list[Sampled]:
        """The batches of one pass over ``n`` samples, as indices and seeds.

        Without a generator they are in order. With one they are drawn, and an incomplete batch is left out.
        """
        size = min(self.batch_size, n)
        if generator is None:
            return [(part, part) for part in torch.split(torch.arange(n), size)]
        if self.weights is None:
            drawn = torch.randperm(n, generator=generator)
        else:
            drawn = torch.multinomial(self.weights.double(), n, replacement=True, generator=generator)
        seeds = torch.randint(2**31, (n,), generator=generator)
        pairs = zip(torch.split(drawn, size), torch.split(seeds, size), strict=True)
        begin, every = self.share
        return [(drawn[begin::every], seeds[begin::every]) for drawn, seeds in pairs if len(drawn) == size]


@dataclass(frozen=True)
class HeldImages:
    """Decoded images in memory, as bytes: a quarter of the size of the model's float32 inputs.

    Attributes:
        pixels: The images as stored, shape ``(n, channels, height, width)``.
        y: Targets.
        preprocessing: Applied batch by batch.
        sampling: How they are served.
        device: The device to preprocess them on: bytes are copied to it faster than floats.
    """

    pixels: Tensor
    y: Tensor
    preprocessing: Preprocessing
    sampling: Sampling
    device: torch.device = CPU

    @property
    def n_samples(self) -> int:
        """The number of samples in the split."""
        return len(self.pixels)

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return self.sampling.batch_size

    @property
    def hashes(self) -> Hashes:
        """The hashes of the images, see `autocompress.splits.row_hashes`."""
        return row_hashes(self.pixels)

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, see `autocompress.splits.Split.batches`; with a generator the samples are augmented."""
        names = self.sampling.augmentations
        for chosen, seeds in self.sampling.order(self.n_samples, generator):
            pixels = self.pixels[chosen]
            if generator is not None and names:
                pixels = torch.stack(
                    [augment(one, names, seed) for one, seed in zip(pixels, seeds.tolist(), strict=True)]
                )
            yield self.preprocessing(pixels.to(self.device)), self.y[chosen]

    def kept_on(self, device: torch.device, room_bytes: int) -> "HeldImages":
        """The same split, preprocessed on a device, and held there if it is not augmented and there is room."""
        if self.sampling.augmentations or self.pixels.nbytes > room_bytes:
            return replace(self, device=device)
        return replace(self, pixels=self.pixels.to(device), y=self.y.to(device), device=device)

    def share(self, rank: int, size: int) -> "HeldImages":
        """The split with a share of each training batch, see `autocompress.learning.ranks.Share`."""
        return replace(self, sampling=replace(self.sampling, share=(rank, size)))

    def fingerprint(self) -> bytes:
        """A hash of the samples and their preprocessing."""
        return hashlib.sha256(as_bytes(self.pixels) + as_bytes(self.y) + _recipe(self.preprocessing)).digest()


@dataclass(frozen=True)
class FileImages:
    """Images that are read when they are needed, by `Sampling.workers` processes.

    Attributes:
        files: One file per sample.
        y: Targets.
        preprocessing: Applied batch by batch.
        sampling: How they are served.
        device: The device to preprocess them on. They are copied to a GPU as bytes, from pinned memory.
        hashes: Of the decoded images, see `autocompress.splits.row_hashes`; None if that is not known.
    """

    files: Sequence[Path]
    y: Tensor
    preprocessing: Preprocessing
    sampling: Sampling
    device: torch.device = CPU
    hashes: Hashes | None = None

    @property
    def n_samples(self) -> int:
        """The number of samples in the split."""
        return len(self.files)

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return self.sampling.batch_size

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """One pass, see `autocompress.splits.Split.batches`; with a generator the samples are augmented."""
        order = self.sampling.order(self.n_samples, generator)
        names = self.sampling.augmentations if generator is not None else ()
        reader = _Reader(self.files, self.y, self.preprocessing, names)
        keys = [list(zip(chosen.tolist(), seeds.tolist(), strict=True)) for chosen, seeds in order]
        # A sample's seed goes with its index, so the number of workers, and which of them reads it, do not matter.
        loader = DataLoader(
            reader,
            batch_sampler=keys,
            num_workers=self.sampling.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        for pixels, y in loader:
            yield self.preprocessing(pixels.to(self.device, non_blocking=True)), y

    def kept_on(self, device: torch.device, room_bytes: int) -> "FileImages":
        """The same split, preprocessed on a device."""
        return replace(self, device=device)

    def share(self, rank: int, size: int) -> "FileImages":
        """The split with a share of each training batch, see `autocompress.learning.ranks.Share`."""
        return replace(self, sampling=replace(self.sampling, share=(rank, size)))

    def fingerprint(self) -> bytes:
        """A hash of the files' names and sizes (reading them would take long), targets and preprocessing."""
        listed = json.dumps([(file.name, file.stat().st_size) for file in self.files])
        return hashlib.sha256(listed.encode() + as_bytes(self.y) + _recipe(self.preprocessing)).digest()


@dataclass(frozen=True)
class _Reader(Dataset[Batch]):
    """One image and its target, by (index, seed)."""

    files: Sequence[Path]
    y: Tensor
    preprocessing: Preprocessing
    augmentations: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        index, seed = key
        with without_warnings():
            image = decode(self.files[index], self.preprocessing.size, self.preprocessing.channels)
        return augment(image, self.augmentations, seed), self.y[index]


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignores warnings in a ``with`` block around `decode` or `shape_of`: Pillow warns of odd metadata.

    The block has to be around the threads that call these, not in them: warning filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class BadImageError(ValueError):
    """A file is not an image that can be read."""


def decode(file: Path, size: Size | None, channels: int) -> Tensor:
    """The image in a file as bytes of shape ``(channels, height, width)``, at its own size if none is given.

    Pixels of 16 bits are scaled to 8.

    Raises:
        BadImageError: If it cannot be read.
    """
    try:
        with Image.open(file) as image:
            if _is_deep(image):
                pixels = _from_deep(np.asarray(image))
            else:
                mode = "L" if channels == 1 else "RGB"
                pixels = torch.from_numpy(np.array(image.convert(mode))).view(*reversed(image.size), -1)
    except Exception as error:  # Pillow's decoders may raise anything on damaged bytes
        raise BadImageError(f"{file}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    image_first = with_channels(pixels.permute(2, 0, 1).contiguous(), channels)
    return image_first if size is None else resize(image_first, size)


def _from_deep(values: np.ndarray) -> Tensor:
    """Grey values from 0 to 65535 as bytes, shape ``(height, width, 1)``."""
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are NaN or infinite")
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its values go from {values.min()} to {values.max()}; 16-bit images go from 0 to 65535")
    return torch.from_numpy((values.astype(np.float64) / 257).round().astype(np.uint8))[..., None]


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def is_deep(file: Path) -> bool:
    """Whether an image has more than eight bits a pixel."""
    with Image.open(file) as image:
        return _is_deep(image)


def shape_of(file: Path) -> tuple[Size, int]:
    """Height and width of an image, and its number of channels (1 or 3), from its header.

    Raises:
        BadImageError: If it cannot be read.
    """
    try:
        with Image.open(file) as image:
            grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
            return (image.height, image.width), 1 if grey else 3
    except Exception as error:
        raise BadImageError(f"{file}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _recipe(preprocessing: Preprocessing) -> bytes:
    return json.dumps(asdict(preprocessing)).encode()
