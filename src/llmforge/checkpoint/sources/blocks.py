"""Tensors put together from pieces of files: what ranks, chunks and stacked layers are read as.

A foreign checkpoint that was cut by rank, or into chunks, is described by `Pieced` tensors, which
know which bytes of which file each of their parts is. Joining, cutting and taking layers out of
them reads nothing; `fill` reads just the bytes that are asked for, so memory does not grow with
the tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmforge.safetensors_io import NUMPY_DTYPES, Array, TensorInfo

Bytes = NDArray[np.uint8]
Fill = Callable[[int, Bytes], None]
"""Called as fill(first, out): copies the bytes from number `first` on into `out`."""


@dataclass(frozen=True)
class Block:
    """Rows `row:row + rows` of a tensor, and of each the bytes `column:column + columns`. They
    lie end to end in `fill`'s storage, from byte `first` on."""

    row: int
    rows: int
    column: int
    columns: int
    fill: Fill
    first: int = 0


@dataclass(frozen=True)
class Pieced:
    """A vector or matrix whose blocks cover it exactly, or a stack of matrices. A row of a vector
    is one element, a row of a stack one matrix."""

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * NUMPY_DTYPES[self.dtype].itemsize

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape, 0, self.shape[0] * self.row_bytes)

    def rows(self, start: int, stop: int) -> Pieced:
        """The rows `start:stop`."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        blocks = []
        for block in self.blocks:
            first = max(block.row, start)
            count = min(block.row + block.rows, stop) - first
            if count > 0:
                offset = block.first + (first - block.row) * block.columns
                blocks.append(
                    Block(first - start, count, block.column, block.columns, block.fill, offset)
                )
        return Pieced(self.dtype, (stop - start, *self.shape[1:]), tuple(blocks))

    def fill(self, first: int, out: Bytes) -> None:
        """Copy the tensor's bytes from number `first` on into `out`, which they fill."""
        width = self.row_bytes
        if all(block.columns == width for block in self.blocks):
            for block in self.blocks:
                begin = block.row * width
                start = max(first, begin)
                stop = min(first + out.size, begin + block.rows * width)
                if start < stop:
                    block.fill(block.first + start - begin, out[start - first : stop - first])
            return
        start, stop = first // width, -(-(first + out.size) // width)
        whole = np.empty((stop - start, width), np.uint8)
        for block in self.rows(start, stop).blocks:
            strip = np.empty(block.rows * block.columns, np.uint8)
            block.fill(block.first, strip)
            whole[
                block.row : block.row + block.rows, block.column : block.column + block.columns
            ] = strip.reshape(block.rows, block.columns)
        skip = first - start * width
        out[:] = whole.reshape(-1)[skip : skip + out.size]

    def read(self) -> Array:
        """A fresh array of the whole tensor."""
        result = np.empty(self.info.nbytes, np.uint8)
        self.fill(0, result)
        return result.view(NUMPY_DTYPES[self.dtype]).reshape(self.shape)


def whole(info: TensorInfo, fill: Fill) -> Pieced:
    """A tensor whose bytes lie end to end."""
    item = NUMPY_DTYPES[info.dtype].itemsize
    shape = info.shape or (1,)
    width = math.prod(shape[1:]) * item
    return Pieced(info.dtype, shape, (Block(0, shape[0], 0, width, fill),))


def stacked_rows(tensors: Sequence[Pieced]) -> Pieced:
    """The tensors below each other."""
    assert len({(t.dtype, t.shape[1:]) for t in tensors}) == 1, [t.info for t in tensors]
    starts = itertools.accumulate((t.shape[0] for t in tensors), initial=0)
    blocks = [
        Block(b.row + start, b.rows, b.column, b.columns, b.fill, b.first)
        for start, tensor in zip(starts, tensors, strict=False)
        for b in tensor.blocks
    ]
    rows = sum(t.shape[0] for t in tensors)
    return Pieced(tensors[0].dtype, (rows, *tensors[0].shape[1:]), tuple(blocks))


def beside(tensors: Sequence[Pieced]) -> Pieced:
    """The matrices next to each other."""
    assert len({(t.dtype, t.shape[0]) for t in tensors}) == 1, [t.info for t in tensors]
    starts = itertools.accumulate((t.row_bytes for t in tensors), initial=0)
    blocks = [
        Block(b.row, b.rows, b.column + start, b.columns, b.fill, b.first)
        for start, tensor in zip(starts, tensors, strict=False)
        for b in tensor.blocks
    ]
    columns = sum(t.shape[1] for t in tensors)
    return Pieced(tensors[0].dtype, (tensors[0].shape[0], columns), tuple(blocks))


def cut(tensor: Pieced, sizes: Sequence[int]) -> list[Pieced]:
    """Consecutive parts of so many rows, which are all there are."""
    assert sum(sizes) == tensor.shape[0], (sizes, tensor.shape)
    ends = itertools.accumulate(sizes)
    return [tensor.rows(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def unstacked(tensor: Pieced) -> list[Pieced]:
    """The matrices of a stack whose bytes lie end to end."""
    [block] = tensor.blocks
    rows, shape = tensor.shape[1], tensor.shape[1:]
    width = tensor.row_bytes // max(rows, 1)
    return [
        Pieced(
            tensor.dtype,
            shape,
            (Block(0, rows, 0, width, block.fill, block.first + index * tensor.row_bytes),),
        )
        for index in range(tensor.shape[0])
    ]


def by_group(tensor: Pieced, groups: int, sizes: Sequence[int]) -> list[Pieced]:
    """A tensor made of `groups` alike, each of parts of so many rows: all first parts, all second
    parts, …"""
    size = sum(sizes)
    assert groups * size == tensor.shape[0], (groups, sizes, tensor.shape)
    parts = [cut(tensor.rows(i * size, (i + 1) * size), sizes) for i in range(groups)]
    return [stacked_rows(column) for column in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor of any rank: where it starts, its sizes, and its storage, row by row."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    fill: Fill
    first: int = 0


def from_chunks(dtype: str, shape: tuple[int, ...], chunks: Sequence[Chunk]) -> Pieced | None:
    """The vector or matrix that the chunks make up, or None where they do not cover it once."""
    item = NUMPY_DTYPES[dtype].itemsize
    if len(shape) not in (1, 2):
        return None
    blocks = []
    for chunk in chunks:
        column, columns = (chunk.offsets[1], chunk.sizes[1]) if len(shape) == 2 else (0, 1)
        blocks.append(
            Block(
                chunk.offsets[0],
                chunk.sizes[0],
                column * item,
                columns * item,
                chunk.fill,
                chunk.first,
            )
        )
    width = math.prod(shape[1:]) * item
    return Pieced(dtype, shape, tuple(blocks)) if _tile(blocks, shape[0], width) else None


def _tile(blocks: Sequence[Block], rows: int, width: int) -> bool:
    """Whether the blocks cover so many rows of so many bytes, everything once."""
    down = sorted({0, rows, *(b.row for b in blocks), *(b.row + b.rows for b in blocks)})
    across = sorted(
        {0, width, *(b.column for b in blocks), *(b.column + b.columns for b in blocks)}
    )
    times = np.zeros((len(down) - 1, len(across) - 1), np.int64)
    for b in blocks:
        first, last = down.index(b.row), down.index(b.row + b.rows)
        left, right = across.index(b.column), across.index(b.column + b.columns)
        times[first:last, left:right] += 1
    inside = (down[0], down[-1], across[0], across[-1]) == (0, rows, 0, width)
    return inside and bool((times == 1).all())


def layers_from_chunks(
    dtype: str, shape: tuple[int, ...], chunks: Sequence[Chunk]
) -> Iterator[Pieced | None]:
    """What `from_chunks` gives for each index of the first dimension, along which the layers of
    a model are stacked."""
    item = NUMPY_DTYPES[dtype].itemsize
    for layer in range(shape[0]):
        of_layer = []
        for chunk in chunks:
            index = layer - chunk.offsets[0]
            if 0 <= index < chunk.sizes[0]:
                first = chunk.first + index * math.prod(chunk.sizes[1:]) * item
                of_layer.append(Chunk(chunk.offsets[1:], chunk.sizes[1:], chunk.fill, first))
        yield from_chunks(dtype, shape[1:], of_layer)
