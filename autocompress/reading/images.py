"""Splits of images: held in memory once they are decoded, or read from files by workers where they do not fit."""

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
from autocompress.splits import Batch, as_bytes

CPU = torch.device("cpu")
Sampled = tuple[Tensor, Tensor]  # indices of samples, and a seed for each


@dataclass(frozen=True)
class Sampling:
    """How a split is served.

    Attributes:
        batch_size: Samples in a full batch.
        augmentations: What `augment` does to training samples.
        weights: How often a sample is drawn for training, relative to the others; None for once each.
        workers: Processes that read files; 0 for none.
        share: Of each batch for training, the samples from this place on and the distance to the next: where
            several processes divide a batch.
    """

    batch_size: int = 64
    augmentations: tuple[str, ...] = ()
    weights: Tensor | None = None
    workers: int = 0
    share: tuple[int, int] = (0, 1)

    def order(self, n: int, generator: torch.Generator | None) -> list[Sampled]:
        """The batches of one pass: in order, or drawn by the generator with the last incomplete one left out."""
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
    """Decoded images in memory: a quarter of the size of what the model sees.

    Attributes:
        pixels: As stored, shape ``(n, channels, height, width)``.
        y: Targets.
        preprocessing: Applied batch by batch.
        sampling: How they are served.
        device: Where they are preprocessed: bytes are a quarter of what it makes of them.
    """

    pixels: Tensor
    y: Tensor
    preprocessing: Preprocessing
    sampling: Sampling
    device: torch.device = CPU

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""
        return len(self.pixels)

    @property
    def batch_size(self) -> int:
        """Samples in a full batch."""
        return self.sampling.batch_size

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
        """The same preprocessed on a device, and kept there if nothing augments them and there is room."""
        if self.sampling.augmentations or self.pixels.nbytes > room_bytes:
            return replace(self, device=device)
        return replace(self, pixels=self.pixels.to(device), y=self.y.to(device), device=device)

    def share(self, rank: int, size: int) -> "HeldImages":
        """The same with a share of each batch for training, see `autocompress.learning.ranks.Share`."""
        return replace(self, sampling=replace(self.sampling, share=(rank, size)))

    def fingerprint(self) -> bytes:
        """A hash of the samples."""
        return hashlib.sha256(as_bytes(self.pixels) + as_bytes(self.y) + _recipe(self.preprocessing)).digest()


@dataclass(frozen=True)
class FileImages:
    """Images that are read as they are needed, by `Sampling.workers` processes.

    Attributes:
        files: One a sample.
        y: Targets.
        preprocessing: Applied batch by batch.
        sampling: How they are served.
        device: Where they are preprocessed. To a GPU they go as bytes, from memory that it reads by itself.
    """

    files: Sequence[Path]
    y: Tensor
    preprocessing: Preprocessing
    sampling: Sampling
    device: torch.device = CPU

    @property
    def n_samples(self) -> int:
        """How many samples the split holds."""
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
        # A sample's seed travels with its index, so it does not matter which worker reads it, or how many
        # there are.
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
        """The same preprocessed on a device."""
        return replace(self, device=device)

    def share(self, rank: int, size: int) -> "FileImages":
        """The same with a share of each batch for training, see `autocompress.learning.ranks.Share`."""
        return replace(self, sampling=replace(self.sampling, share=(rank, size)))

    def fingerprint(self) -> bytes:
        """A hash of the files' names and sizes and of the targets: reading all of them would take too long."""
        listed = json.dumps([(file.name, file.stat().st_size) for file in self.files])
        return hashlib.sha256(listed.encode() + as_bytes(self.y) + _recipe(self.preprocessing)).digest()


@dataclass(frozen=True)
class _Reader(Dataset[Batch]):
    """One image and its target by (index, seed)."""

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
    """For a ``with`` block around `decode` or `shape_of`: Pillow warns of odd metadata.

    Around the threads that call these, not within: Python's filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class BadImageError(ValueError):
    """A file is not an image that can be read."""


def decode(file: Path, size: Size | None, channels: int) -> Tensor:
    """The image in a file as bytes of shape ``(channels, height, width)``, at its own size if none is given.

    Sixteen bits a pixel are brought to eight.

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
    except Exception as error:  # Pillow's decoders raise whatever their bytes make them
        raise BadImageError(f"{file}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    image_first = with_channels(pixels.permute(2, 0, 1).contiguous(), channels)
    return image_first if size is None else resize(image_first, size)


def _from_deep(values: np.ndarray) -> Tensor:
    """Grey values of more than eight bits as bytes, shape ``(height, width, 1)``."""
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
    """Height and width of an image and how many channels it has, from its header.

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
