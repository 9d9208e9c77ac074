"""What code does on a CUDA device, told without one: its launches, and every place where the host would wait.

Tensors of the device are meta tensors (shape and dtype, no memory) which say that they are on a CUDA device. Tensors of
the host are real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["ImaginedGPU", "WaitError"]

_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
# What launches nothing beside views: allocations that write nothing, and reshapes of memory that nobody else has.
_FREE = (
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::_unsafe_view", "aten::_reshape_alias"),
)
_VALUES = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__)
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class WaitError(AssertionError):
    """The host would wait for the device here."""


class ImaginedGPU:
    """A CUDA device without memory, inside `with`: "cuda" is its name, whether this machine has one or not.

    Attributes:
        launches: inside `watch`, operators that launch a kernel or a copy, by name. Views and allocations launch
            nothing. An operator of Denim counts as one launch, and so does every one of torch's.
        watching: whether this is inside `watch`.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.watching = False
        self._pinned: list[Tensor] = []
        self._modes = ExitStack()

    def __enter__(self) -> ImaginedGPU:
        self._modes.enter_context(_Devices(self))
        self._modes.enter_context(_Operators(self))
        for name in ("_exchange_device", "_maybe_exchange_device"):  # `torch.cuda.device` asks the driver
            self._modes.enter_context(patch.object(torch.cuda, name, lambda index: -1))
        # So does the question for free memory, of which there is more than any plan takes.
        self._modes.enter_context(patch.object(torch.cuda, "mem_get_info", lambda device: (2**60, 2**60)))
        # Lists of tensors go to operators for lists, as they do on CUDA.
        kinds = patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"])
        self._modes.enter_context(kinds)
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    @contextmanager
    def watch(self) -> Iterator[Counter[str]]:
        """Inside, launches are counted anew, and what would make the host wait for the device raises `WaitError`.

        The host waits where it reads a value of the device (`item`, `tolist`, `numpy`, a copy to the host, an operator
        whose result is as long as a mask has true elements), where a copy to the device is not `non_blocking`, and
        where such a copy is from memory that is not pinned: the driver then waits for the stream, and for the copy.
        """
        self.launches = Counter()
        self.watching = True
        try:
            yield self.launches
        finally:
            self.watching = False

    def pin(self, tensor: Tensor) -> Tensor:
        """Let a tensor of the host count as pinned memory; its `pin_memory` returns a copy that does."""
        self._pinned.append(tensor)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether `pin` has seen the tensor's memory."""
        start = tensor.untyped_storage().data_ptr()
        return any(start == pinned.untyped_storage().data_ptr() for pinned in self._pinned)

    def look(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count a call of an operator and check that it does not wait."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to = kwargs.get("device")
        if not self.watching or not ((to is not None and to.type == "meta") or any(map(_on_device, tensors))):
            return
        hosts = [tensor for tensor in tensors if not _on_device(tensor)]
        if (to is not None and to.type == "cpu") or (func is _ATEN.copy_.default and not _on_device(args[0])):
            raise WaitError(f"{func} copies to the host")
        if _READS & set(func.tags):
            raise WaitError(f"{func} reads a value of the device")
        if func in _COPIES and hosts:
            what = f"a copy of {tuple(hosts[0].shape)} {hosts[0].dtype} to the device"
            if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                raise WaitError(f"{what} is not non_blocking")
            if not self.is_pinned(hosts[0]):
                raise WaitError(f"{what} is from memory that is not pinned")
        elif any(tensor.dim() for tensor in hosts):  # a single number of the host is an argument of the kernel
            raise WaitError(f"{func} takes a tensor of the host")
        if not func.is_view and func._schema.name not in _FREE:
            self.launches[str(func)] += 1


def _on_device(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


class _Devices(TorchFunctionMode):
    """Calls that name the device get meta tensors, and meta tensors say that they are on the device."""

    def __init__(self, gpu: ImaginedGPU) -> None:
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__ and _on_device(args[0]):
            return torch.device("cuda", 0)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined] # torch's stubs have its value
            return _on_device(args[0])
        if func is Tensor.is_pinned:
            return self.gpu.is_pinned(args[0])
        if func is Tensor.pin_memory:
            return args[0] if self.gpu.is_pinned(args[0]) else self.gpu.pin(args[0].clone())
        if self.gpu.watching and func in _VALUES and _on_device(args[0]):
            raise WaitError(f"{func.__name__} reads a value of the device")
        kwargs = kwargs or {}
        device = kwargs.get("device", args[0].device if func is Tensor.new_tensor else None)
        made = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        if self.gpu.watching and made and _moved(device) == torch.device("meta"):
            raise WaitError(f"{func.__name__} copies from memory that is not pinned, and waits")
        if func not in (torch.device, torch.get_device_module):  # they take names and make no tensor
            args, kwargs = tree_map(_moved, (args, kwargs))
        return func(*args, **kwargs)


def _moved(argument: Any) -> Any:
    if isinstance(argument, torch.device) and argument.type == "cuda":
        return torch.device("meta")
    return torch.device("meta") if isinstance(argument, str) and argument.split(":")[0] == "cuda" else argument


class _Operators(TorchDispatchMode):
    def __init__(self, gpu: ImaginedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.gpu.look(func, args, kwargs)
        if func is _ATEN._fused_adamw_.tensor_lr:  # in place, and without an implementation for meta tensors
            return None
        return func(*args, **kwargs)
