"""How a rank reaches the others of its engine: which GPU it takes, the memory that ranks share, and
NCCL where they cannot share any."""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence
from typing import Any

import torch

from llmforge.comm import Comm, local_ranks
from llmforge.engine.cuda.program import Links, Program, Transfer
from llmforge.errors import TargetError
from llmforge.kernels import exchange
from llmforge.kernels.collectives import GROUP_SLOT, MAIL_SLOT, MAX_RANKS, TENSOR_RANK
from llmforge.kernels.driver import Sizes
from llmforge.kernels.exchange import DriverMemory, Peers, SharedRegions, reaches_peers
from llmforge.parallel import Topology


def take_device(comm: Comm) -> torch.device:
    """Make a GPU of this machine the current one: ranks take them in turn, and share them where
    there are fewer."""
    number, _ = local_ranks(comm)
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)  # makes the context that the driver's calls need
    return device


class Ranks:
    """This rank among the others. All ranks make one together, and call `connect` and `close`."""

    def __init__(
        self, comm: Comm, topology: Topology, device: torch.device, *, shared: bool = True
    ) -> None:
        """shared: where ranks reach each other's memory, they exchange in it. Raises TargetError
        where they can exchange by no means."""
        self.rank = comm.rank
        self._comm, self._topology = comm, topology
        self._peers = exchange.peers_of(comm.rank, topology)
        self._regions: SharedRegions | None = None
        self._nccl: _Nccl | None = None
        self.links = Links()
        if topology.world_size == 1:
            return
        memory, peers = DriverMemory(), self._peers
        few = topology.tensor_parallel <= MAX_RANKS
        self.links = Links(
            group=shared and few and reaches_peers(memory, comm, Peers(peers.group)),
            messages=shared and reaches_peers(memory, comm, Peers((), peers.to, peers.source)),
        )
        if self.links != Links():
            self._nccl = _Nccl(comm, topology, device)

    def connect(self, programs: Sequence[Program], sizes: Sizes) -> dict[str, int]:
        """The addresses of what the programs' exchanges use, by buffer, and their sizes into
        `sizes`."""
        if self._topology.world_size == 1:
            return {}
        group = exchange.slot_units(max(p.group_slot for p in programs) if self.links.group else 0)
        mail = exchange.slot_units(max(p.mail_slot for p in programs))
        sizes.set(TENSOR_RANK, self._topology.tensor_rank(self.rank))
        sizes.set(GROUP_SLOT, group)
        sizes.set(MAIL_SLOT, mail)
        peers = Peers(
            self._peers.group if self.links.group else (),
            self._peers.to if self.links.messages else None,
            self._peers.source if self.links.messages else None,
        )
        self._regions = SharedRegions(DriverMemory(), self._comm, peers, 16 * group, 16 * mail)
        return self._regions.addresses

    def transfer(self, call: Transfer, operand: torch.Tensor, parts: torch.Tensor) -> None:
        """NCCL's part of an exchange, in order of the current stream."""
        assert self._nccl is not None
        self._nccl.transfer(call, operand, parts)

    def close(self) -> None:
        if self._regions is not None:
            self._regions.close()
        if self._nccl is not None:
            self._nccl.close()


class _Nccl:
    """The engine's ranks and its tensor-parallel groups in torch.distributed."""

    def __init__(self, comm: Comm, topology: Topology, device: torch.device) -> None:
        import torch.distributed as dist

        make_store: Any = getattr(dist, "TCPStore", None)  # not there without NCCL either
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        cards = comm.gather((platform.node(), uuid))
        for rank, card in enumerate(cards):
            if (first := cards.index(card)) != rank:
                raise TargetError(
                    f"ranks {first} and {rank} share a GPU of {card[0]} but cannot share its "
                    "memory (CUDA IPC), and NCCL wants a GPU for each rank; start them on as many "
                    "GPUs, or in one container"
                )
        if make_store is None or not dist.is_nccl_available():
            raise TargetError(
                "ranks cannot reach each other's GPU memory, and this torch has no NCCL to "
                "exchange with instead"
            )
        one_machine = len({machine for machine, _ in cards}) == 1
        host = "127.0.0.1" if one_machine else socket.getfqdn()
        store: Any = None
        if comm.rank == 0:
            store = make_store(host, 0, comm.size, True, wait_for_workers=False)
        host, port = comm.broadcast((host, store.port) if store else None)
        store = store or make_store(host, port, comm.size, False)
        dist.init_process_group(
            "nccl", store=store, rank=comm.rank, world_size=comm.size, device_id=device
        )
        self._dist = dist
        ranks = topology.tensor_parallel
        for stage in range(topology.pipeline_parallel):
            members = [topology.rank(stage, tensor_rank) for tensor_rank in range(ranks)]
            group = dist.new_group(members)  # every rank makes every group
            if comm.rank in members:
                self._group = group

    def transfer(self, call: Transfer, operand: torch.Tensor, parts: torch.Tensor) -> None:
        if call.kind == "send":
            self._dist.send(operand, call.peer)
        elif call.kind == "receive":
            self._dist.recv(operand, call.peer)
        else:
            count = self._dist.get_world_size(self._group) * operand.numel()
            gathered = parts.view(operand.dtype)[:count]
            self._dist.all_gather_into_tensor(gathered, operand.view(-1), self._group)

    def close(self) -> None:
        self._dist.destroy_process_group()
