"""Ranks as threads of one process: the `Comm` protocol without MPI."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np

from llmforge.comm import Comm

T = TypeVar("T")
TIMEOUT = 60.0  # seconds; a rank that waits longer has been left alone


class _Group:
    """What the ranks of a group share."""

    def __init__(self, size: int, children: list[_Group] | None = None) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)
        self.slots: list[Any] = [None] * size
        self.splits: dict[tuple[int, ...], _Group] = {}
        self.mail: dict[tuple[int, int], deque[Any]] = {}
        self.arrived = threading.Condition()
        self.broken = False
        self.lock = threading.Lock()
        self.family = children if children is not None else []
        self.family.append(self)

    def break_all(self) -> None:
        """Wake every rank that waits anywhere in the job with BrokenBarrierError."""
        for group in list(self.family):
            group.broken = True
            group.barrier.abort()
            with group.arrived:
                group.arrived.notify_all()


class ThreadComm:
    """One rank's view. Make them with `run_ranks`."""

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def broadcast(self, value: T | None, root: int = 0) -> T:
        import pickle

        if self.rank == root:
            self._group.slots[root] = pickle.dumps(value)
        self._group.barrier.wait()
        received = pickle.loads(self._group.slots[root])
        self._group.barrier.wait()
        return received

    def gather(self, value: T) -> list[T]:
        import pickle

        return [pickle.loads(part) for part in self._exchange(pickle.dumps(value))]

    def all_gather(self, send: np.ndarray, receive: np.ndarray) -> None:
        assert receive.shape == (self.size, *send.shape) and receive.dtype == send.dtype
        for row, part in enumerate(self._exchange(send.copy())):
            receive[row] = part

    def all_to_all(self, send: np.ndarray, receive: np.ndarray) -> None:
        assert send.shape == receive.shape and len(send) == self.size
        for row, part in enumerate(self._exchange(send.copy())):
            receive[row] = part[self.rank]

    def send(self, array: np.ndarray, to: int) -> None:
        with self._group.arrived:
            self._group.mail.setdefault((self.rank, to), deque()).append(array.copy())
            self._group.arrived.notify_all()

    def receive(self, array: np.ndarray, source: int) -> None:
        key = (source, self.rank)
        with self._group.arrived:
            self._group.arrived.wait_for(
                lambda: self._group.mail.get(key) or self._group.broken, timeout=TIMEOUT
            )
            if not self._group.mail.get(key):
                raise threading.BrokenBarrierError
            sent = self._group.mail[key].popleft()
        assert sent.shape == array.shape and sent.dtype == array.dtype
        array[...] = sent

    def split(self, color: int) -> Comm:
        colors = self.gather(color)
        members = tuple(rank for rank, other in enumerate(colors) if other == color)
        with self._group.lock:
            if members not in self._group.splits:
                self._group.splits[members] = _Group(len(members), self._group.family)
            group = self._group.splits[members]
        self.barrier()
        with self._group.lock:
            self._group.splits.pop(members, None)  # the next split makes groups of its own
        self.barrier()
        return ThreadComm(group, members.index(self.rank))

    def barrier(self) -> None:
        self._group.barrier.wait()

    def abort(self, code: int) -> NoReturn:
        self._group.break_all()
        raise SystemExit(code)

    def _exchange(self, value: Any) -> list[Any]:
        self._group.slots[self.rank] = value
        self._group.barrier.wait()
        values = list(self._group.slots)
        self._group.barrier.wait()
        return values


def run_ranks(size: int, work: Callable[[ThreadComm], T]) -> list[T]:
    """``work(comm)`` on `size` ranks at once; the results in rank order. The first error of a rank
    ends the others and is raised."""
    group = _Group(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(group, rank))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError) or not group.broken:
                errors.append(error)
            group.break_all()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results
