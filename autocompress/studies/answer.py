"""Loads the compressed model of a study as a module."""

from pathlib import Path

from torch import Tensor, nn

from autocompress.arguments import instance, path, takes
from autocompress.disk.record import answer_folder
from autocompress.formats import bundle


@takes(directory=path, model=instance("a torch.nn.Module", nn.Module), example_input=instance("a tensor", Tensor))
def load(directory: str | Path, model: nn.Module | None = None, example_input: Tensor | None = None) -> nn.Module:
    """Loads the compressed model of a study as a module, as it was trained: to fine-tune or to measure it.

    Args:
        directory: A study's folder, its subfolder ``best/``, or a copy of that.
        model: Any instance of the dense architecture; its weights do not matter and it is not changed. Not
            needed for tasks that autocompress itself has made.
        example_input: A batch of one sample; zeros of the stored shape by default.

    Returns:
        The realized model with the stored weights, in eval mode on the CPU.

    Raises:
        ValueError: If the study has no answer, a file is missing, damaged or of another version, or ``model`` is
            of another architecture.
    """
    return bundle.load(answer_folder(Path(directory)), model, example_input)
