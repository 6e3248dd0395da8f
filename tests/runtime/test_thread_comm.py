"""The in-process Comm that multi-rank tests stand on."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from thread_comm import run_ranks


def test_collectives():
    def work(comm):
        assert comm.broadcast(("hello", comm.rank) if comm.rank == 1 else None, root=1) == (
            "hello",
            1,
        )
        assert comm.gather(comm.rank * 2) == [0, 2, 4]
        everyone = np.zeros((3, 2), np.int64)
        comm.all_gather(np.array([comm.rank, 7]), everyone)
        assert everyone.tolist() == [[0, 7], [1, 7], [2, 7]]
        received = np.zeros(3, np.int64)
        comm.all_to_all(np.arange(3) + 10 * comm.rank, received)
        assert received.tolist() == [comm.rank, 10 + comm.rank, 20 + comm.rank]
        comm.barrier()
        return comm.rank

    assert run_ranks(3, work) == [0, 1, 2]


def test_messages_come_in_order_and_are_copies():
    def work(comm):
        if comm.rank == 0:
            value = np.zeros(2, np.float32)
            for number in range(3):
                value[:] = number
                comm.send(value, 1)
            return None
        received = []
        for _ in range(3):
            value = np.empty(2, np.float32)
            comm.receive(value, 0)
            received.append(value[0])
        return received

    assert run_ranks(2, work)[1] == [0, 1, 2]


def test_split_twice():
    def work(comm):
        column = comm.split(comm.rank % 2)
        row = comm.split(comm.rank // 2)
        return column.gather(comm.rank), row.gather(comm.rank), column.rank, row.rank

    assert run_ranks(4, work) == [
        ([0, 2], [0, 1], 0, 0),
        ([1, 3], [0, 1], 0, 1),
        ([0, 2], [2, 3], 1, 0),
        ([1, 3], [2, 3], 1, 1),
    ]


@pytest.mark.parametrize("waiting", ["barrier", "receive", "split"])
def test_a_rank_that_fails_ends_the_others(waiting):
    def work(comm):
        if comm.rank == 0:
            raise ValueError("rank 0 failed")
        if waiting == "receive":
            comm.receive(np.zeros(1), 0)
        elif waiting == "split":
            comm.split(1).barrier()
        comm.barrier()

    before = threading.active_count()
    with pytest.raises(ValueError, match="rank 0 failed"):
        run_ranks(3, work)
    assert threading.active_count() == before


def test_abort():
    with pytest.raises(SystemExit):
        run_ranks(2, lambda comm: comm.abort(3) if comm.rank else comm.barrier())
