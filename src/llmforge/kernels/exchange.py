"""The memory that ranks write into for each other (csrc/exchange.cuh has its layout).

Each rank allocates a region on its GPU and opens those of the ranks that it works with: by CUDA IPC
for other processes, on the same GPU or on another of the machine that can be reached directly.
Needs no torch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmforge.comm import Comm
from llmforge.errors import TargetError
from llmforge.kernels.collectives import GROUP, HEADER_BYTES, MAIL
from llmforge.kernels.driver import check, open_handle, shared_handle
from llmforge.parallel import Topology

_ALIGNMENT = 256


class DeviceMemory(Protocol):
    """What regions need of a GPU."""

    def allocate(self, nbytes: int) -> int:
        """The address of zeroed memory, an allocation of its own. It may be zeroed later, in order
        of what `upload` and `synchronize` order."""
        ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None: ...

    def synchronize(self) -> None: ...

    def share(self, address: int) -> bytes:
        """A handle with which another process on this machine opens this allocation."""
        ...

    def open_shared(self, handle: bytes) -> int: ...

    def close_shared(self, address: int) -> None: ...


class DriverMemory:
    """The GPU of the current context, through the driver."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver

    def allocate(self, nbytes: int) -> int:
        address = int(check(self._driver.cuMemAlloc(nbytes)))
        check(self._driver.cuMemsetD8(address, 0, nbytes))
        return address

    def free(self, address: int) -> None:
        check(self._driver.cuMemFree(address))

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        check(self._driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))

    def synchronize(self) -> None:
        check(self._driver.cuCtxSynchronize())

    def share(self, address: int) -> bytes:
        return shared_handle(address)

    def open_shared(self, handle: bytes) -> int:
        return open_handle(handle)

    def close_shared(self, address: int) -> None:
        check(self._driver.cuIpcCloseMemHandle(address))


@dataclass(frozen=True)
class Peers:
    """Ranks of the engine: the tensor-parallel group of this one in its order, and those that it
    sends to and hears from."""

    group: tuple[int, ...] = ()
    to: int | None = None
    source: int | None = None

    @property
    def all(self) -> set[int]:
        messages = {rank for rank in (self.to, self.source) if rank is not None}
        return messages | set(self.group)


@dataclass(frozen=True)
class _Card:
    """What a rank tells the others about its region."""

    machine: str
    process: int
    address: int
    handle: bytes
    mailbox: int  # bytes from the region's start


class SharedRegions:
    """This rank's region, and those of its peers opened. All ranks of `comm` make one together.
    `addresses` are those of the operands `collectives.GROUP` and `MAIL`, by buffer."""

    def __init__(
        self, memory: DeviceMemory, comm: Comm, peers: Peers, group_slot: int, mail_slot: int
    ) -> None:
        """The slots' sizes in bytes, multiples of 16: the group's are the same on all its ranks,
        and a mailbox's the same for sender and receiver. Raises TargetError, on every rank, where
        one of them cannot reach a peer's memory."""
        self._memory, self._comm = memory, comm
        self._opened: list[int] = []
        mailbox = _aligned(HEADER_BYTES + 2 * group_slot)
        self._region = memory.allocate(mailbox + _aligned(HEADER_BYTES + 2 * mail_slot))
        memory.synchronize()
        cards = comm.gather(
            _Card(platform.node(), os.getpid(), self._region, memory.share(self._region), mailbox)
        )
        try:
            regions, failed = {r: self._open(cards[r], cards[comm.rank]) for r in peers.all}, None
        except TargetError as error:
            regions, failed = {}, str(error)
        self.addresses: dict[str, int] = {}
        if reasons := [reason for reason in comm.gather(failed) if reason]:
            self.close()
            raise TargetError(reasons[0])
        self.addresses[GROUP.buffer] = self._table(regions[rank] for rank in peers.group)
        mailboxes = (comm.rank, peers.to, peers.source)
        own = {**regions, comm.rank: self._region}
        self.addresses[MAIL.buffer] = self._table(
            0 if rank is None else own[rank] + cards[rank].mailbox for rank in mailboxes
        )

    def close(self) -> None:
        """Give everything back, once no rank uses it any more. All ranks call it."""
        self._memory.synchronize()
        self._comm.barrier()
        for address in self._opened:
            self._memory.close_shared(address)
        self._comm.barrier()
        for address in (self._region, *self.addresses.values()):
            self._memory.free(address)
        self._opened.clear()
        self.addresses.clear()

    def _open(self, card: _Card, own: _Card) -> int:
        if (card.machine, card.process) == (own.machine, own.process):
            return card.address
        if card.machine != own.machine:
            raise TargetError(f"{card.machine} and {own.machine} share no memory")
        self._opened.append(self._memory.open_shared(card.handle))
        return self._opened[-1]

    def _table(self, addresses: Iterable[int]) -> int:
        """An array of addresses on the device."""
        array = np.array(list(addresses) or [0], np.uint64)
        table = self._memory.allocate(array.nbytes)
        self._memory.upload(table, array)
        self._memory.synchronize()
        return table


def reaches_peers(memory: DeviceMemory, comm: Comm, peers: Peers) -> bool:
    """Whether every rank of `comm` can write into the memory of its peers. All ranks ask together
    and get the same answer."""
    try:
        SharedRegions(memory, comm, peers, 0, 0).close()
    except TargetError:
        return False
    return True


def slot_units(nbytes: int) -> int:
    """A slot's size as kernels are given it: units of 16 bytes, whole `_ALIGNMENT`s."""
    return _aligned(nbytes) // 16


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def peers_of(rank: int, topology: Topology) -> Peers:
    """Whom a rank works with: its tensor-parallel group, and the ranks beside it in the stages
    around its own. The first rank of the last stage sends logits to rank 0."""
    ranks, stages = topology.tensor_parallel, topology.pipeline_parallel
    stage, tensor_rank = topology.stage(rank), topology.tensor_rank(rank)
    group = tuple(topology.rank(stage, other) for other in range(ranks)) if ranks > 1 else ()
    to = None if topology.is_last_stage(rank) else topology.rank(stage + 1, tensor_rank)
    source = None if topology.is_first_stage(rank) else topology.rank(stage - 1, tensor_rank)
    if tensor_rank == 0 and stages > 1:
        to = 0 if to is None else to
        source = topology.rank(stages - 1, 0) if source is None else source
    return Peers(group, to, source)
