"""torch's .bin files: what is in them is found without loading it, then read by offset.

`torch.load(map_location="meta")` unpickles with `weights_only=True` and tells for each storage
where its bytes lie in the file. Files in the format before torch 1.6 have no such offsets and are
loaded whole, a file at a time.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.errors import SourceError
from llmforge.safetensors_io import (
    LFS_POINTER,
    NUMPY_DTYPES,
    Array,
    TensorInfo,
    read_into,
)

_TORCH_DTYPES = {
    **{name: name for name in NUMPY_DTYPES},
    "float8_e4m3fn": "float8_e4m3",
    "float8_e8m0fnu": "float8_e8m0",
}


@dataclass(frozen=True)
class _View:
    """Where a tensor's elements lie: the first one's byte offset, and strides in elements."""

    offset: int
    strides: tuple[int, ...]
    contiguous: bool


class TorchFile:
    """A .bin file opened for reading. Raises SourceError where it is damaged or would need code
    of its own to load."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = _open(path)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._loaded: Mapping[str, Any] | None = None  # files of the old format only
        self._whole: tuple[str, NDArray[np.uint8]] | None = None  # a tensor that is not contiguous
        try:
            state = _load(path, "meta")
            self.tensors = {name: _info(path, name, tensor) for name, tensor in state.items()}
            self._views = {name: _view(tensor) for name, tensor in state.items()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._loaded = self._whole = None
        self._finalizer()

    def read(self, name: str) -> Array:
        """A fresh contiguous array of the tensor."""
        info, view = self.tensors[name], self._views[name]
        if view is None:
            return self._read_loaded(name)
        dtype = NUMPY_DTYPES[info.dtype]
        span = 1 + sum((n - 1) * step for n, step in zip(info.shape, view.strides, strict=True))
        if 0 in info.shape:
            return np.empty(info.shape, dtype)
        flat = np.empty(span, dtype)
        self._read_into(name, view.offset, flat.view(np.uint8))
        steps = [step * dtype.itemsize for step in view.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, info.shape, steps))

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        """Copy the tensor's bytes from number `first` on into `out`, which they fill."""
        view = self._views[name]
        if view is not None and view.contiguous:
            self._read_into(name, view.offset + first, out)
            return
        if self._whole is None or self._whole[0] != name:
            self._whole = name, self.read(name).reshape(-1).view(np.uint8)
        out[:] = self._whole[1][first : first + out.size]

    def _read_into(self, name: str, offset: int, out: NDArray[np.uint8]) -> None:
        try:
            read_into(self._fd, offset, out)
        except EOFError:
            raise SourceError(
                f"{self.path} is truncated: it ends in the middle of tensor {name!r}"
            ) from None
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror}") from error

    def _read_loaded(self, name: str) -> Array:
        import torch

        if self._loaded is None:
            self._loaded = _load(self.path, "cpu")
        tensor = self._loaded[name].detach().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        info = self.tensors[name]
        result: Array = raw.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape).copy()
        return result


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if os.pread(fd, len(LFS_POINTER), 0) == LFS_POINTER:
        os.close(fd)
        raise SourceError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with: git lfs pull"
        )
    return fd


def _load(path: Path, device: str) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise SourceError(
            f"reading {path} needs torch, which is not installed; "
            "run: pip install 'llmforge[torch]'"
        ) from error
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # zip, pickle and torch errors alike
        # torch's own message may advise to load unsafely; ours must not.
        unsafe = "weights_only" in str(error).lower() or "WeightsUnpickler" in str(error)
        reason = (
            "it holds more than tensors, and loading the rest could execute code"
            if unsafe and not _looks_truncated(path)
            else "it is truncated or not a torch file"
        )
        raise SourceError(f"cannot read {path}: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise SourceError(f"{path} is not a table of tensors by name")
    return dict(state)


def _looks_truncated(path: Path) -> bool:
    """A zip file whose directory, which stands at its end, is not there."""
    import zipfile

    with open(path, "rb") as file:
        return file.read(2) == b"PK" and not zipfile.is_zipfile(path)


def _info(path: Path, name: str, tensor: Any) -> TensorInfo:
    theirs = str(tensor.dtype).removeprefix("torch.")
    if theirs not in _TORCH_DTYPES or tensor.layout != _strided():
        raise SourceError(f"{path}: tensor {name!r} is {theirs}, {tensor.layout}: not supported")
    return TensorInfo(_TORCH_DTYPES[theirs], tuple(tensor.shape), 0, tensor.nbytes)


def _strided() -> Any:
    import torch

    return torch.strided


def _view(tensor: Any) -> _View | None:
    """None where the file's format does not tell."""
    base = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if base is None:
        return None
    first = tensor.storage_offset() * tensor.element_size()
    return _View(int(base) + first, tuple(tensor.stride()), tensor.is_contiguous())
