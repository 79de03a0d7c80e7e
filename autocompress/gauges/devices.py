"""The devices that torch can compute on here, as users name them."""

import os

import torch


def usable_device(device: str | torch.device) -> str:
    """The name of the device asked for; for ``auto`` ``"cuda"`` where there is a GPU, and else ``"cpu"``.

    Raises:
        ValueError: If it is not a device, or not on this machine.
    """
    if isinstance(device, torch.device):
        device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type if isinstance(device, str) else ""
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}; it must be auto, cpu, cuda or cuda:i")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but this machine has no GPU that torch can use; try cpu")
    return device


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
