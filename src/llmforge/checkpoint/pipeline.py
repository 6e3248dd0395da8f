"""Reading ahead of the work, in bounded memory.

Tensors that are only renamed pass through a few small buffers that are used over and over: they
stay in the processor's cache, so reading, checking, hashing and writing them costs little more
than a copy of the file. Groups that need all of their values at once are read whole.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmforge.checkpoint.mapping import Group
from llmforge.checkpoint.sources.base import Source
from llmforge.safetensors_io import NUMPY_DTYPES, Array

PIECE = 1 << 21  # bytes of a buffer
BUFFERS = 8
READ_AHEAD = 256 << 20  # bytes of whole groups
MOST_IN_FLIGHT = 1 << 30


class Stopped(Exception):
    """The other side of the pipeline is gone."""


class BufferPool:
    """Buffers of `size` bytes, at most `count` of them. May be used from several threads."""

    def __init__(self, count: int, size: int) -> None:
        self._size = size
        self._free: queue.SimpleQueue[NDArray[np.uint8] | None] = queue.SimpleQueue()
        self._unmade = count

    def take(self) -> NDArray[np.uint8]:
        """A buffer, as soon as one is free. Raises Stopped."""
        if self._unmade and self._free.empty():
            self._unmade -= 1
            return np.empty(self._size, np.uint8)
        buffer = self._free.get()
        if buffer is None:
            self._free.put(None)
            raise Stopped
        return buffer

    def give(self, buffer: NDArray[np.uint8]) -> None:
        self._free.put(buffer)

    def stop(self) -> None:
        """End the waiting of whoever waits for a buffer."""
        self._unmade = 0
        self._free.put(None)


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of the one tensor of a group without `convert`, flat. They lie in
    `buffer`, which goes back to the pool when they are no longer needed."""

    group: Group
    values: Array
    buffer: NDArray[np.uint8]


@dataclass(frozen=True)
class Whole:
    """A group with `convert`, and its tensors or the run of rows that it is about."""

    group: Group
    arrays: list[Array]


def read_ahead(
    source: Source, groups: Iterable[Group], pool: BufferPool
) -> Generator[Piece | Whole, None, None]:
    """What the groups need, in order, read by a thread while the caller works.

    Besides the pool's buffers, the tensors of whole groups are held: at most READ_AHEAD bytes,
    those that the caller works on included; or two groups, where these are larger but fit
    MOST_IN_FLIGHT; or one group of any size. Close the generator to end the thread.
    """
    ready: queue.SimpleQueue[Piece | Whole | BaseException | None] = queue.SimpleQueue()
    room = _Room()

    def work() -> None:
        try:
            for group in groups:
                if group.convert is None:
                    for piece in _pieces(source, group, pool):
                        ready.put(piece)
                else:
                    room.enter(group.nbytes)
                    ready.put(Whole(group, [_read(source, n, group.rows) for n in group.theirs]))
            ready.put(None)
        except Stopped:
            pass
        except BaseException as error:  # raised again in the caller's thread
            ready.put(error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            size = item.group.nbytes if isinstance(item, Whole) else 0
            yield item
            del item
            if size:
                room.leave(size)
    finally:
        pool.stop()
        room.stop()
        thread.join()


def _read(source: Source, name: str, rows: tuple[int, int] | None) -> Array:
    """A tensor, or a run of its first dimension."""
    if rows is None:
        return source.read(name)
    info = source.tensors[name]
    part = info.rows(*rows)
    result = np.empty(part.nbytes, np.uint8)
    source.fill(name, part.start - info.start, result)
    return result.view(NUMPY_DTYPES[info.dtype]).reshape(part.shape)


def _pieces(source: Source, group: Group, pool: BufferPool) -> Iterable[Piece]:
    [name] = group.theirs
    info = source.tensors[name]
    for first in range(0, max(info.nbytes, 1), PIECE):
        buffer = pool.take()
        part = buffer[: min(PIECE, info.nbytes - first)]
        source.fill(name, first, part)
        yield Piece(group, part.view(NUMPY_DTYPES[info.dtype]), buffer)


class _Room:
    """Counts the whole groups in memory."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._bytes = 0
        self._groups = 0
        self._stopped = False

    def enter(self, nbytes: int) -> None:
        """Wait until a group of this size may be read. Raises Stopped."""

        def fits() -> bool:
            after = self._bytes + nbytes
            return (
                self._stopped
                or self._groups == 0
                or after <= READ_AHEAD
                or (self._groups == 1 and after <= MOST_IN_FLIGHT)
            )

        with self._changed:
            self._changed.wait_for(fits)
            if self._stopped:
                raise Stopped
            self._bytes += nbytes
            self._groups += 1

    def leave(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._groups -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
