"""torch's files (.bin, .pt, .pth): what is in them is found without loading it, and read by offset.

`torch.load(map_location="meta")` unpickles with `weights_only=True` and tells for each storage
where its bytes lie in the file. Files in the format before torch 1.6 have no such offsets and are
loaded whole, a file at a time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.checkpoint.sources.files import Slice
from llmforge.errors import SourceError
from llmforge.safetensors_io import NUMPY_DTYPES, Array, TensorInfo

_TORCH_DTYPES = {
    **{name: name for name in NUMPY_DTYPES},
    "float8_e4m3fn": "float8_e4m3",
    "float8_e8m0fnu": "float8_e8m0",
}


# Under which name files that hold more than the weights have them.
_STATES = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class _View:
    """Where a tensor's elements lie: the first one's byte offset, and strides in elements."""

    offset: int
    strides: tuple[int, ...]
    contiguous: bool


class TorchFile:
    """A torch file opened for reading: a table of tensors by name, alone or under one of the names
    in _STATES. Raises SourceError where it is damaged or would need code of its own to load.

    `ignored` is how the names of entries end that may be something else than a tensor.
    """

    def __init__(self, part: Slice, ignored: str = "") -> None:
        self._part = part
        self._ignored = ignored
        self._loaded: Mapping[str, Any] | None = None  # files of the old format only
        self._whole: tuple[str, NDArray[np.uint8]] | None = None  # a tensor that is not contiguous
        state = _load(part, "meta", ignored)
        self.tensors = {name: _info(part, name, tensor) for name, tensor in state.items()}
        self._views = {name: _view(tensor) for name, tensor in state.items()}

    def close(self) -> None:
        self._loaded = self._whole = None

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
        self._part.fill(view.offset, flat.view(np.uint8))
        steps = [step * dtype.itemsize for step in view.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, info.shape, steps))

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        """Copy the tensor's bytes from number `first` on into `out`, which they fill."""
        view = self._views[name]
        if view is not None and view.contiguous:
            self._part.fill(view.offset + first, out)
            return
        if self._whole is None or self._whole[0] != name:
            self._whole = name, self.read(name).reshape(-1).view(np.uint8)
        out[:] = self._whole[1][first : first + out.size]

    def _read_loaded(self, name: str) -> Array:
        import torch

        if self._loaded is None:
            self._loaded = _load(self._part, "cpu", self._ignored)
        tensor = self._loaded[name].detach().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        info = self.tensors[name]
        result: Array = raw.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape).copy()
        return result


def _load(part: Slice, device: str, ignored: str) -> dict[str, Any]:
    state = load_torch(part, device)
    if isinstance(state, dict):
        state = next((state[key] for key in _STATES if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise SourceError(f"{part.label} is not a table of tensors by name")
    tensors = {}
    for name, value in state.items():
        if is_tensor(value):
            tensors[name] = value
        elif not (ignored and name.endswith(ignored)):
            raise SourceError(f"{part.label} is not a table of tensors by name: {name!r} is none")
    return tensors


def is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def load_torch(part: Slice, device: str) -> Any:
    """What the file holds, read without running any code of its own. Raises SourceError."""
    try:
        import torch
    except ImportError as error:
        raise SourceError(
            f"reading {part.label} needs torch, which is not installed; "
            "run: pip install 'llmforge[torch]'"
        ) from error
    try:
        # Files in memory are what Transformer Engine keeps the scales of FP8 in.
        with part.stream() as file, torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(file, map_location=device, weights_only=True)
    except SourceError:
        raise
    except Exception as error:  # zip, pickle and torch errors alike
        # torch's own message may advise to load unsafely; ours must not.
        unsafe = "weights_only" in str(error).lower() or "WeightsUnpickler" in str(error)
        reason = (
            "it holds more than tensors, and loading the rest could execute code"
            if unsafe and not _looks_truncated(part)
            else "it is truncated or not a torch file"
        )
        raise SourceError(f"cannot read {part.label}: {reason}") from error


def _looks_truncated(part: Slice) -> bool:
    """A zip file whose directory, which stands at its end, is not there."""
    import zipfile

    with part.stream() as file:
        return file.read(2) == b"PK" and not zipfile.is_zipfile(file)


def _info(part: Slice, name: str, tensor: Any) -> TensorInfo:
    theirs = str(tensor.dtype).removeprefix("torch.")
    if theirs not in _TORCH_DTYPES or tensor.layout != _strided():
        raise SourceError(
            f"{part.label}: tensor {name!r} is {theirs}, {tensor.layout}: not supported"
        )
    return TensorInfo(_TORCH_DTYPES[theirs], tuple(tensor.shape), 0, tensor.nbytes)


def tensor_view(part: Slice, value: Any) -> tuple[TensorInfo, int]:
    """Of a file that holds one contiguous tensor, loaded to "meta": what it is, and the offset of
    its bytes. Raises SourceError."""
    view = _view(value) if is_tensor(value) else None
    if view is None or not view.contiguous:
        raise SourceError(f"{part.label} is not a tensor stored as a whole")
    return _info(part, "it", value), view.offset


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
