"""A stand-in for a GPU: tensors that say they are on ``cuda:0`` and compute on the CPU.

It refuses what CUDA refuses: operands on two devices, a generator of the other one, values of a tensor there that
NumPy, a pickle or a pointer would read. So a line that forgets where a tensor is fails on a machine without a GPU
as it would on one. It says nothing of CUDA's speed, memory or rounding.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda", 0)
NAME = "stand-in for a GPU"
ACROSS = ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize")  # operators between devices
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_")


class OnGpu(Tensor):
    """A tensor on the stand-in; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        # Of the meta device to C++: autograd would ask the driver for a stream, if it knew of CUDA.
        with _disable_current_modes(), torch.inference_mode(False):
            shape = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            made = torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=CUDA)
        made.held = held
        return made

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_meta = is_cpu = property(lambda _: False)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGpu":
        made = memo[id(self)] = OnGpu(self.held.detach().clone())
        made.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "held"}
        return made.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tensor on the GPU travels to another process; it is of this one")

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"


class SecondDevice(TorchDispatchMode):
    """Sends tensors that are made on, or moved to, ``cuda`` to the stand-in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the CPU, its results where CUDA would have them."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = any(isinstance(one, OnGpu) for one in tensors)
    name = func.overloadpacket.__name__
    asked = kwargs.get("device")
    asked = torch.device(asked) if asked is not None else None
    to_gpu = asked.type in ("cuda", "meta") if asked is not None else there
    if there and name not in ACROSS:
        _check_devices(name, args, tensors)
    if name == "copy_" and not isinstance(args[0], OnGpu):
        to_gpu = False
    for generator in (leaf for leaf in leaves if isinstance(leaf, torch.Generator)):
        if to_gpu and generator.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    own = {id(one.held): one for one in tensors if isinstance(one, OnGpu)}
    leaves = [leaf.held if isinstance(leaf, OnGpu) else leaf for leaf in leaves]
    plain_args, plain_kwargs = tree_unflatten(leaves, spec)
    if asked is not None and to_gpu:
        plain_kwargs["device"] = torch.device("cpu")
    found = func(*plain_args, **plain_kwargs)
    if not to_gpu:
        return found

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return own[id(x)] if id(x) in own else OnGpu(x)

    ours = tree_map(placed, found)
    return return_and_correct_aliasing(func, args, kwargs, ours) if there else ours


def _check_devices(name: str, args: Any, tensors: list[Tensor]) -> None:
    if name in INDEXED and isinstance(args[0], OnGpu):  # indices may be on the CPU, values may not
        tensors = [one for one in tree_flatten(args[2:])[0] if isinstance(one, Tensor)]
    for one in tensors:
        if not isinstance(one, OnGpu) and one.dim() > 0:
            same = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"{same} (in {name})")


@contextmanager
def second_device() -> Iterator[None]:
    """In the ``with`` block ``cuda`` is the stand-in, in this thread."""
    rng = torch.ByteTensor(16)
    properties = SimpleNamespace(name=NAME, uuid="none", total_memory=2**34, major=9, minor=0)
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "mem_get_info": (2**33, 2**34),
        "memory_allocated": 0,
        "max_memory_allocated": 2**20,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "synchronize": None,
        "get_rng_state": rng,
        "set_rng_state": None,
        "is_bf16_supported": True,
        "current_stream": SimpleNamespace(record_event=lambda event: event.record()),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", _Event))
        stack.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
        torch._C._set_cudnn_enabled(False)  # its operators have no kernels for the CPU
        # A tensor cannot become one of the stand-in by its `.data`.
        stack.callback(
            torch.__future__.set_overwrite_module_params_on_conversion,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, where there is no driver
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` starts CUDA otherwise
        stack.enter_context(SecondDevice())
        yield


class _Event:
    """In place of `torch.cuda.Event`: what runs has run when the call returns."""

    def __init__(self, **_: Any) -> None:
        self.at_s = 0.0

    def record(self, *_: Any) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return 1e3 * (end.at_s - self.at_s)
