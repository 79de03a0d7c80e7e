"""Weights on disk: a state dict as a safetensors file, without pickle; zeros take no space.

A tensor with enough zeros is stored as its non-zero values and a mask of their positions: one bit per entry,
compressed by zlib (RFC 1950), so that a regular mask, as of blocks, takes almost nothing. A tensor that several
names share is stored once. All other tensors are stored as in any safetensors file, and other readers can read
them. The file's metadata describe the rest in JSON, with a checksum that reveals damage::

    {"sparse": {name: shape}, "same": {name: name of the tensor that is stored}, "crc32": of all tensors' bytes}
"""

import json
import math
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

_METADATA_KEY = "autocompress"
_MASK = "#mask"
# Values are copied as integers of their width, so that NaNs keep their bits.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Bytes in the header for a second tensor, without its name.
_HEADER_BYTES = 128


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the bytes of a safetensors file; equal state dicts give equal bytes.

    Args:
        state: Tensors by name, of any shape, dtype and device; they may share memory.
    """
    stored: dict[str, Tensor] = {}
    sparse: dict[str, list[int]] = {}
    same: dict[str, str] = {}
    first_with: dict[Any, str] = {}
    for name, tensor in state.items():
        first = first_with.setdefault(_memory(tensor), name) if tensor.numel() else name
        if first != name:
            same[name] = first
            continue
        # A copy, as safetensors refuses tensors that overlap.
        dense = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        packed = None if name + _MASK in state else _pack(dense, header=2 * len(name) + _HEADER_BYTES)
        if packed is None:
            stored[name] = dense
        else:
            stored[name], stored[name + _MASK] = packed
            sparse[name] = list(dense.shape)
    notes: dict[str, Any] = {key: value for key, value in (("sparse", sparse), ("same", same)) if value}
    notes["crc32"] = _checksum(serialize(stored))  # the tensors' bytes do not depend on the metadata
    return serialize(stored, {_METADATA_KEY: json.dumps(notes)})


def save(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a state dict to ``path`` atomically: a reader never sees half a file."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(to_bytes(state))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a state dict that `save` wrote, onto the CPU; also reads any other safetensors file.

    The tensors are equal bit for bit, but for the sign of zeros in those stored sparse: -0.0 becomes 0.0. Names
    that shared a tensor share one again.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a complete safetensors file, or its content contradicts its metadata.
    """
    data = Path(path).read_bytes()
    try:
        return _from_bytes(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{os.fspath(path)!r} is not a readable weights file: {reason}") from error


def _from_bytes(data: bytes) -> dict[str, Tensor]:
    state = parse(data)
    metadata = json.loads(data[8 : _header_end(data)]).get("__metadata__", {})
    notes = json.loads(metadata.get(_METADATA_KEY, "{}"))
    if "crc32" in notes and notes["crc32"] != _checksum(data):
        raise ValueError("its weights are not those that were written (crc32)")
    for name, shape in notes.get("sparse", {}).items():
        state[name] = _unpack(state[name], state.pop(name + _MASK), shape)
    for name, first in notes.get("same", {}).items():
        state[name] = state[first]
    return state


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _checksum(data: bytes) -> int:
    """The CRC-32 of the tensors in a safetensors file."""
    return zlib.crc32(memoryview(data)[_header_end(data) :])


def _memory(tensor: Tensor) -> Any:
    """A key that two tensors share if and only if they are the same view of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _pack(dense: Tensor, header: int) -> tuple[Tensor, Tensor] | None:
    """The non-zero values ``(nnz,)`` and their compressed mask ``(m,)``; None where that is no smaller."""
    if dense.itemsize not in _WORDS:
        return None
    words = dense.reshape(-1).view(_WORDS[dense.itemsize]).numpy()
    # Multiplying by a mask leaves -0.0 for negative weights: those count as zeros too.
    kept = (dense != 0).reshape(-1).numpy() if dense.dtype in _FLOATS else words != 0
    saved = (kept.size - np.count_nonzero(kept)) * dense.itemsize - header
    if saved <= 0:
        return None
    mask = zlib.compress(np.packbits(kept).tobytes(), level=9)
    if saved <= len(mask):
        return None
    return torch.from_numpy(words[kept]).view(dense.dtype), torch.from_numpy(np.frombuffer(mask, np.uint8).copy())


def _unpack(values: Tensor, mask: Tensor, shape: list[int]) -> Tensor:
    """The dense tensor of ``shape``, from the values and the mask of `_pack`."""
    count = math.prod(shape)
    n_bytes = math.ceil(count / 8)
    bits = zlib.decompressobj().decompress(mask.numpy().tobytes(), n_bytes + 1)  # a damaged one may be endless
    if len(bits) != n_bytes:
        raise ValueError(f"a mask of {len(bits)} bytes does not fit the shape {shape}")
    kept = np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)
    if np.count_nonzero(kept) != values.numel():
        raise ValueError(f"a mask of {np.count_nonzero(kept)} weights does not fit {values.numel()} values")
    words = torch.zeros(count, dtype=_WORDS[values.itemsize])
    words.numpy()[kept] = values.view(words.dtype).numpy()
    return words.view(values.dtype).reshape(shape)
