"""The default task: scikit-learn's digits with a small residual network."""

from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from autocompress.arguments import path, takes, whole
from autocompress.models import trained
from autocompress.splits import TensorSplit
from autocompress.task import Task, as_task


@takes(cache=path, seed=whole)
def digits(cache: Path | str | None = None, seed: int = 0) -> Task:
    """The default task: 1,797 scanned digits of 8x8 pixels and a small residual network.

    The images are the UCI "Optical Recognition of Handwritten Digits" that come with scikit-learn, scaled to
    0…1 and split 50/25/25 into train, val and test, stratified by digit. The network is trained on first use,
    which takes seconds.

    Args:
        cache: Folder in which the trained network is stored; without one it is trained at every call.
        seed: Seeds the split and the training.
    """
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / images.max(), dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels, dtype=torch.long)
    train, rest = train_test_split(range(len(y)), train_size=0.5, stratify=y, random_state=seed)
    val, test = train_test_split(rest, train_size=0.5, stratify=y[rest], random_state=seed)
    parts = [TensorSplit(x[part], y[part]) for part in (train, val, test)]
    folder = Path(cache) if cache else None
    model = trained("digits", parts[0], F.cross_entropy, epochs=30, lr=0.1, seed=seed, cache=folder)
    preprocessing = "Grey values from 0 to 16, divided by 16."
    return Task(model, *parts, name="digits", architecture="digits", preprocessing=preprocessing)


def checked_task(given: Task | Callable[[], Task] | None, out: Path, progress: Callable[[str], None]) -> Task:
    """The given task, the one that a given function returns, or by default the digits; checked by `Task.check`.

    Args:
        given: See `autocompress.task.as_task`.
        out: The folder of all studies, whose cache holds the digits' network.
        progress: Called with a line of text before the digits' network is trained or loaded.

    Raises:
        ValueError: If ``given`` is no task, or `Task.check` refuses it.
    """
    if given is None:
        progress("training the dense model, or taking it from the cache")
        given = digits(cache=out / "cache")
    task = as_task(given)
    task.check()
    return task
