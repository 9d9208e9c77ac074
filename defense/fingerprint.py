"""Fingerprints: a digest of what a model computes, from its weights, its settings and its code."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import types
from collections import deque
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from denim.defense.de3 import De3

__all__ = ["Fingerprints"]

# Their code is known by their versions, which are no part of a fingerprint.
LIBRARIES = ("torch", "timm", "numpy")
PLAIN = (
    type(None), type(...), bool, int, float, complex, str, bytes, range, slice, enum.Enum, PurePath,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
# What every module has, beside what makes it the module that it is: parameters, children and hooks are looked at by
# themselves, and the mode is that of an evaluation.
OF_ALL_MODULES = frozenset(vars(nn.Module()))
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Fingerprints:
    """Fingerprints of models and attacks. What several of them share is digested once.

    A fingerprint covers weights and buffers (also those that are not saved), attributes, the source code of every class
    of the module tree with its bases, hooks, and functions that were put in place of `forward`, with what they close
    over. It is the same in every process. It does not cover global names that the code refers to, nor the code of
    torch, timm and NumPy, which their versions tell.

    A class whose objects have attributes that do not change what they compute, such as counters and logs, names them in
    `not_in_fingerprint`. A `De3` counts by its settings: draws of an evaluation are keyed by the evaluation's seed and
    not by its own.
    """

    def __init__(self) -> None:
        # The object is kept with its digest: another one must not get its id.
        self._known: dict[int, tuple[object, bytes]] = {}
        self._open: dict[int, int] = {}
        self._reference = frozenset(vars(De3(None, nn.Identity(), None)))

    def of(self, value: object) -> bytes:
        """The fingerprint, 16 bytes.

        Args:
            value: a module, an attack, or any object.
        """
        if isinstance(value, PLAIN):
            return _hashed(type(value).__qualname__, repr(value))
        if (known := self._known.get(id(value))) is not None:
            return known[1]
        if id(value) in self._open:  # it refers to itself
            return _hashed("above", len(self._open) - self._open[id(value)])
        self._open[id(value)] = len(self._open)
        try:
            digest = self._digest(value)
        finally:
            del self._open[id(value)]
        # Of what refers to itself, the digest of a part depends on where the circle was entered.
        if not self._open or isinstance(value, (Tensor, type)):
            self._known[id(value)] = (value, digest)
        return digest

    def _digest(self, value: Any) -> bytes:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, Tensor):
            return _of_tensor(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return _hashed("array", value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
        if isinstance(value, np.generic):
            return _hashed(kind, repr(value))
        if isinstance(value, Mapping):
            return _hashed(kind, *(self.of(part) for item in value.items() for part in item))
        if isinstance(value, (set, frozenset)):
            return _hashed(kind, *sorted(self.of(part) for part in value))
        if isinstance(value, (list, tuple, deque, np.ndarray)):
            return _hashed(kind, *(self.of(part) for part in value))
        if isinstance(value, nn.Module):
            return self._of_module(value)
        if isinstance(value, type):
            return _hashed("class", *(_code(base) for base in value.__mro__ if not _of_library(base)))
        if isinstance(value, types.MethodType):
            return _hashed("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, functools.partial):
            return _hashed("partial", *map(self.of, (value.func, value.args, value.keywords)))
        if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)) or _of_library(type(value)):
            return _hashed(kind, getattr(value, "__name__", ""))
        return _hashed(kind, self.of(type(value)), self.of(dict(getattr(value, "__dict__", {}))))

    def _of_module(self, module: nn.Module) -> bytes:
        parts: list[object] = [type(module).__qualname__, self.of(type(module)), module.extra_repr()]
        if isinstance(module, De3):
            own = {name: part for name, part in vars(module).items() if name not in self._reference}
        else:
            left_out = {*OF_ALL_MODULES, *getattr(type(module), "not_in_fingerprint", ())}
            own = {name: part for name, part in vars(module).items() if name not in left_out}
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                parts += [name, self.of(tensor)]
        parts += [self.of(own), *(self.of(list(vars(module)[name].values())) for name in HOOKS)]
        for name, child in module.named_children():
            parts += [name, self.of(child)]
        return _hashed("module", *parts)

    def _of_function(self, function: types.FunctionType) -> bytes:
        if _of_library(function):
            return _hashed("function", function.__module__, function.__qualname__)
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents))
            except ValueError:  # it is filled later
                cells.append(b"")
        return _hashed(
            "function", _code(function), self.of(function.__defaults__), self.of(function.__kwdefaults__), *cells
        )


def _hashed(*parts: object) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _of_tensor(tensor: Tensor) -> bytes:
    values = tensor.detach()
    if values.is_meta:
        return _hashed("meta tensor", values.dtype, tuple(values.shape))
    if values.is_quantized:
        values = values.dequantize()
    if values.layout != torch.strided:
        values = values.to_dense()
    flat = values.cpu().contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    return _hashed("tensor", tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def _of_library(item: Any) -> bool:
    return str(getattr(item, "__module__", "") or "").partition(".")[0] in LIBRARIES


@functools.cache
def _code(item: Any) -> bytes:
    """Source code of a class or function, or its byte code where there is none (it was typed in, or made by `exec`)."""
    try:
        return inspect.getsource(item).encode("utf-8", "surrogatepass")
    except (OSError, TypeError):
        return _byte_code(item)


def _byte_code(item: Any) -> bytes:
    if isinstance(item, type):
        parts = [name.encode() + _byte_code(value) for name, value in sorted(vars(item).items()) if callable(value)]
        return _hashed(item.__qualname__, *parts)
    code = item if isinstance(item, types.CodeType) else getattr(inspect.unwrap(item), "__code__", None)
    if code is None:
        return _hashed(getattr(item, "__qualname__", type(item).__qualname__))
    constants = [_byte_code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    return _hashed(code.co_code, *code.co_names, *constants)
