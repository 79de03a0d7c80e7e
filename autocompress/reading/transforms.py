"""The preprocessing of all images for the model, and the augmentation of training images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF

Size: TypeAlias = tuple[int, int]

# Mean and standard deviation of ImageNet's channels, of images scaled to 0…1: what torchvision's weights expect.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Single augmentations, and sets of them with which published compression studies on such images were trained.
SINGLE = ("rotation", "flip", "vertical-flip", "crop", "jitter")
SETS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "skin": ("rotation", "flip", "crop", "jitter"),  # lesions: any side, any light
    "xray": ("rotation", "jitter"),  # not flipped: the heart is on the left
    "cells": ("rotation", "flip", "jitter"),  # smears have no left and right
    "natural": ("flip", "crop"),
}


@dataclass(frozen=True)
class Preprocessing:
    """Turns stored pixels into the model's input.

    Attributes:
        size: Height and width.
        channels: 1 for grey, 3 for RGB.
        scale: The factor on pixels: 1/255 brings bytes to 0…1.
        mean: The mean of each channel, which is subtracted; empty for none.
        std: The standard deviation of each channel, by which is divided; empty for none.
    """

    size: Size
    channels: int
    scale: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) not in (0, self.channels) or len(self.std) != len(self.mean):
            raise ValueError(f"mean={self.mean} and std={self.std} do not fit {self.channels} channels")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std={self.std}; a channel is constant, so it cannot be normalised by the data")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Stored pixels ``(n, c, height, width)``, grey or RGB, as the model's input, float32."""
        x = with_channels(pixels, self.channels).float()
        if self.scale != 1:
            x = x * self.scale
        if not self.mean:
            return x
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    @property
    def words(self) -> str:
        """The preprocessing in a sentence, for users who deploy the model."""
        height, width = self.size
        kind = {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels}-channel")
        steps = [f"{kind} images resized to {height} x {width} pixels (bilinear, with antialiasing)"]
        if self.scale != 1:
            steps.append(f"values divided by {1 / self.scale:g}")
        if self.mean:
            mean, std = (" ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
            steps.append(f"the mean ({mean}) subtracted and divided by the standard deviation ({std}) per channel")
        return f"It is made of {', '.join(steps)}."

    def to_json(self) -> dict[str, Any]:
        """The preprocessing in JSON types, without `size`, which the input's shape has."""
        return {
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": "bilinear, antialias",
        }


def resize(pixels: Tensor, size: Size) -> Tensor:
    """Pixels ``(..., height, width)`` resized; the same tensor if they have the size already."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    resized: Tensor = VF.resize(pixels, list(size), InterpolationMode.BILINEAR, antialias=True)
    return resized


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """Pixels ``(..., c, height, width)`` as grey or RGB: grey is repeated, RGB becomes its luminance.

    Raises:
        ValueError: If there is no conversion between these numbers of channels.
    """
    have = pixels.shape[-3]
    if have == channels:
        return pixels
    if have == 1:
        return pixels.expand(*pixels.shape[:-3], channels, *pixels.shape[-2:]).contiguous()
    if have == 3 and channels == 1:
        grey: Tensor = VF.rgb_to_grayscale(pixels)
        return grey
    raise ValueError(f"images of {have} channels cannot be made into {channels}; give --channels {have}")


def parse_augmentations(names: Sequence[str]) -> tuple[str, ...]:
    """The single augmentations that names of augmentations and sets stand for, in a fixed order, each once.

    Raises:
        ValueError: If one is unknown.
    """
    chosen: set[str] = set()
    for name in names:
        if name not in SINGLE and name not in SETS:
            raise ValueError(f"unknown augmentation {name!r} (available: {', '.join((*SETS, *SINGLE))})")
        chosen.update(SETS.get(name, (name,)))
    return tuple(name for name in SINGLE if name in chosen)


@cache
def _transform(names: tuple[str, ...], size: Size) -> v2.Transform:
    made: dict[str, v2.Transform] = {
        "rotation": v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR),
        "flip": v2.RandomHorizontalFlip(),
        "vertical-flip": v2.RandomVerticalFlip(),
        "crop": v2.RandomCrop(size, padding=[max(1, size[1] // 8), max(1, size[0] // 8)], padding_mode="edge"),
        "jitter": v2.ColorJitter(brightness=0.1, contrast=0.1),
    }
    return v2.Compose([made[name] for name in names])


def augment(image: Tensor, names: tuple[str, ...], seed: int) -> Tensor:
    """Augments one image ``(channels, height, width)`` of bytes, or floats from 0 to 1, at random by ``seed``.

    The state of the global generator is restored.
    """
    if not names:
        return image
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        changed: Tensor = _transform(names, (image.shape[-2], image.shape[-1]))(image)
    return changed
