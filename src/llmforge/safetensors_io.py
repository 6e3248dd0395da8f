"""The safetensors format, read and written with plain file calls, or mapped; without torch.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes end to end
(https://github.com/huggingface/safetensors, "Format"). A mapped file's pages count as resident
memory of the process; reading into fresh arrays keeps what a reader holds countable.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llmforge.checksum import new_checksum
from llmforge.errors import LlmforgeError, StoreError

Array = NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_FORMAT_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_TO_FORMAT = {ours: theirs for theirs, ours in _FORMAT_NAMES.items()}

MAX_HEADER = 100_000_000  # the limit of the reference implementation
_ALIGNMENT = 64
_READ_CHUNK = 1 << 26
_ROW_CHUNK = 1 << 22
_WRITE_CHUNK = 1 << 24
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: dtype (a key of NUMPY_DTYPES), shape, and its bytes `start:stop`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Rows ``start:stop`` of the first dimension, as a tensor of their own."""
        assert 0 <= start <= stop <= self.shape[0], (self, start, stop)
        row = self.nbytes // max(self.shape[0], 1)
        shape = (stop - start, *self.shape[1:])
        return TensorInfo(self.dtype, shape, self.start + start * row, self.start + stop * row)


class SafetensorsFile:
    """A safetensors file opened for reading; `tensors` maps names to TensorInfo in file order.

    The header is checked whole before anything is read. Raises `error` where the file is
    truncated, damaged or not a safetensors file. `read` may be called from several threads.
    """

    def __init__(self, path: Path, error: type[LlmforgeError] = StoreError) -> None:
        self.path = path
        self._error = error
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as failure:
            raise error(f"cannot read {path}: {failure.strerror}") from failure
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._mapped: mmap.mmap | None = None
        try:
            self.tensors, self.metadata = self._parse_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._finalizer()

    def read(
        self,
        name: str,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Array:
        """A fresh contiguous array of the tensor, or of ``start:stop`` of its dimension `dim`;
        with `rows`, of that run of its first dimension alone. Needs no more memory than the
        result and a few MB."""
        info = self.tensors[name] if rows is None else self.tensors[name].rows(*rows)
        dtype = NUMPY_DTYPES[info.dtype]
        if not info.shape:
            return self._read_bytes(info.start, info.nbytes).view(dtype).reshape(())
        size = info.shape[dim]
        stop = size if stop is None else stop
        assert 0 <= start <= stop <= size, (name, info.shape, dim, start, stop)
        shape = (*info.shape[:dim], stop - start, *info.shape[dim + 1 :])
        outer = math.prod(info.shape[:dim])
        inner = math.prod(info.shape[dim + 1 :]) * dtype.itemsize
        if outer == 1 or stop - start == size:
            offset = info.start + start * inner
            return (
                self._read_bytes(offset, math.prod(shape) * dtype.itemsize)
                .view(dtype)
                .reshape(shape)
            )
        row = size * inner
        result = np.empty((outer, (stop - start) * inner), np.uint8)
        at_once = max(1, _ROW_CHUNK // max(row, 1))
        for first in range(0, outer, at_once):
            count = min(at_once, outer - first)
            block = self._read_bytes(info.start + first * row, count * row).reshape(count, row)
            result[first : first + count] = block[:, start * inner : stop * inner]
        return result.reshape(-1).view(dtype).reshape(shape)

    def map(self, name: str) -> Array:
        """The tensor where it lies in the file, read-only: pages are read as they are touched,
        and the system may drop them again. They count as the process's resident memory."""
        info = self.tensors[name]
        if self._mapped is None:
            self._mapped = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._mapped, np.uint8, info.nbytes, info.start)
        return flat.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def release(self) -> None:
        """Let go of the memory of what is mapped: what is touched again is read again, from the
        system's cache if it is there."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        """Copy the tensor's bytes from number `first` on into `out`, which they fill."""
        info = self.tensors[name]
        assert first + out.size <= info.nbytes, (name, first, out.size)
        self._read_into(info.start + first, out)

    def _read_bytes(self, offset: int, count: int) -> NDArray[np.uint8]:
        buffer = np.empty(count, np.uint8)
        self._read_into(offset, buffer)
        return buffer

    def _read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        try:
            read_into(self._fd, offset, out)
        except EOFError:
            raise self._error(
                f"{self.path} is truncated: it ends in the middle of a tensor"
            ) from None
        except OSError as failure:
            raise self._error(f"cannot read {self.path}: {failure.strerror}") from failure

    def _parse_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        size = os.fstat(self._fd).st_size
        head = self._read_bytes(0, min(size, len(LFS_POINTER))).tobytes()
        if head == LFS_POINTER:
            raise self._error(
                f"{self.path} is a Git LFS pointer, not the weights; fetch them with: git lfs pull"
            )
        if size < 8:
            raise self._error(f"{self.path} is truncated: {size} bytes are not a safetensors file")
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER:
            raise self._error(f"{self.path} is not a safetensors file: header of {length} bytes")
        if 8 + length > size:
            raise self._error(f"{self.path} is truncated: its header ends after the file does")
        try:
            header = json.loads(
                self._read_bytes(8, length).tobytes(), object_pairs_hook=_unique_keys
            )
        except (ValueError, RecursionError) as failure:
            raise self._error(f"{self.path} is damaged: its header is not valid JSON") from failure
        if not isinstance(header, dict):
            raise self._error(f"{self.path} is damaged: its header is not a table of tensors")
        metadata = header.pop("__metadata__", None) or {}
        data_start = 8 + length
        tensors = {
            name: self._parse_entry(name, entry, data_start) for name, entry in header.items()
        }
        self._check_layout(tensors, data_start, size)
        return tensors, metadata if isinstance(metadata, dict) else {}

    def _parse_entry(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise self._damaged(name, "its entry is not valid") from None
        numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise self._damaged(name, "its shape or offsets are not whole numbers")
        if dtype not in _FORMAT_NAMES:
            raise self._damaged(name, f"its dtype {dtype!r} is unknown")
        ours = _FORMAT_NAMES[dtype]
        nbytes = math.prod(shape) * NUMPY_DTYPES[ours].itemsize
        if stop - start != nbytes:
            raise self._damaged(
                name, f"shape {shape} of {dtype} is {nbytes} bytes, its offsets span {stop - start}"
            )
        return TensorInfo(ours, tuple(shape), data_start + start, data_start + stop)

    def _check_layout(self, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
        """Tensors lie end to end: no overlap, no hole, nothing after the last one."""
        position = data_start
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
            if info.start != position:
                problem = "overlaps another" if info.start < position else "follows a gap"
                raise self._damaged(name, f"it {problem}")
            position = info.stop
        if position > size:
            raise self._error(
                f"{self.path} is truncated: it has {size} of {position} bytes; download it again"
            )
        if position < size:
            raise self._error(
                f"{self.path} is damaged: {size - position} bytes follow the last tensor"
            )

    def _damaged(self, name: str, problem: str) -> LlmforgeError:
        return self._error(f"{self.path} is damaged: tensor {name!r}: {problem}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def read_bytes(fd: int, offset: int, count: int) -> NDArray[np.uint8]:
    """`count` bytes at `offset` in a fresh array. Raises EOFError where the file is shorter."""
    buffer = np.empty(count, np.uint8)
    read_into(fd, offset, buffer)
    return buffer


def read_into(fd: int, offset: int, out: NDArray[np.uint8]) -> None:
    """Fill `out` from `offset` on. Raises EOFError where the file is shorter."""
    view = memoryview(out.data)
    done = 0
    while done < len(view):
        part = os.preadv(fd, [view[done : done + _READ_CHUNK]], offset + done)
        if part == 0:
            raise EOFError
        done += part


class SafetensorsWriter:
    """Writes a safetensors file of tensors that are known in advance, in one pass.

    `tensors` lists (name, dtype, shape); they are written in that order, then `close` is called.
    Its checksum is computed meanwhile in a second thread. The data starts at a
    multiple of 64 bytes. Raises OSError, with the path, where writing fails.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        self._pending = deque(tensors)
        self._written = 0  # elements of the first pending tensor
        self._size = 0
        self._digest = new_checksum()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checksum")
        self._append(memoryview(_header(tensors, metadata)), None)

    def write(self, name: str, array: Array) -> None:
        """Write the next tensor: a contiguous array of the announced dtype and shape."""
        assert array.shape == self._pending[0][2], (name, array.shape, self._pending[0])
        flat = array.reshape(-1)
        step = _WRITE_CHUNK // array.dtype.itemsize
        for first in range(0, max(flat.size, 1), step):
            self.write_piece(name, flat[first : first + step])
        self._hasher.submit(int).result()  # all is hashed: the caller may reuse the memory

    def write_piece(
        self, name: str, piece: Array, release: Callable[[], None] | None = None
    ) -> None:
        """Write the next elements of the tensor that is due. The memory of `piece` stays as it is
        until `release` is called, from another thread; without `release`, for good."""
        expected, dtype, shape = self._pending[0]
        assert name == expected, f"{name} was written where {expected} is due"
        assert piece.dtype == NUMPY_DTYPES[dtype], (name, piece.dtype, dtype)
        self._append(piece.reshape(-1).view(np.uint8).data, release)
        self._written += piece.size
        assert self._written <= math.prod(shape), (name, self._written, shape)
        if self._written == math.prod(shape):
            self._pending.popleft()
            self._written = 0

    @property
    def complete(self) -> bool:
        """Whether all tensors are written."""
        return not self._pending

    def close(self) -> tuple[int, str]:
        """Finish the file: its size and checksum."""
        assert self.complete, f"{len(self._pending)} tensors were not written"
        self.abandon()
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Close what is open, whatever was written."""
        self._hasher.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abandon()

    def _append(self, data: memoryview, release: Callable[[], None] | None) -> None:
        start = self._size
        left = data
        try:
            while left:
                count = os.write(self._fd, left)
                self._size += count
                left = left[count:]
            # Start writing to disk now, while more is computed, not in a burst at the end.
            os.posix_fadvise(self._fd, start, self._size - start, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        # Hashing releases the GIL: it runs beside the next write.
        self._hasher.submit(self._hash, data, release)

    def _hash(self, data: memoryview, release: Callable[[], None] | None) -> None:
        self._digest.update(data)
        if release is not None:
            release()


def _header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> bytes:
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        table[name] = {
            "dtype": _TO_FORMAT[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
