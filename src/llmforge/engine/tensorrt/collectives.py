"""How the ranks of an engine meet: memory that they write into for each other, between engines;
an NCCL communicator, for collectives inside engines.
"""

from __future__ import annotations

import ctypes

from llmforge.comm import Comm
from llmforge.engine.tensorrt.device import Device
from llmforge.engine.tensorrt.kernels import exchange, largest
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.errors import TargetError
from llmforge.kernels.collectives import GROUP_SLOT, MAIL_SLOT, TENSOR_RANK
from llmforge.kernels.driver import Sizes
from llmforge.kernels.exchange import SharedRegions, peers_of, slot_units
from llmforge.parallel import Topology

_UNIQUE_ID_BYTES = 128


def shared_regions(
    plan: RankPlan, topology: Topology, comm: Comm, device: Device, sizes: Sizes
) -> SharedRegions | None:
    """The memory in which the plan's exchanges meet those of the other ranks; None where the
    engine has no steps between ranks. Raises TargetError where ranks cannot reach each other."""
    if topology.world_size == 1:
        return None
    slots = {GROUP_SLOT: 0, MAIL_SLOT: 0}
    for profile in plan.profiles:
        most = largest(profile)
        for step in plan.steps:
            if step.kind == "engine":
                continue
            kind = MAIL_SLOT if step.kind in ("send", "recv") else GROUP_SLOT
            slots[kind] = max(slots[kind], slot_units(exchange(plan, step, most).slot_bytes))
    # A rank's mailbox is as large as the largest message between any two.
    slots[MAIL_SLOT] = max(comm.gather(slots[MAIL_SLOT]))
    for name, units in slots.items():
        sizes.set(name, units)
    sizes.set(TENSOR_RANK, topology.tensor_rank(comm.rank))
    try:
        return SharedRegions(
            device,
            comm,
            peers_of(comm.rank, topology),
            slots[GROUP_SLOT] * 16,
            slots[MAIL_SLOT] * 16,
        )
    except TargetError as error:
        raise TargetError(
            f"the ranks of this engine cannot reach each other's GPU memory ({error}); run them on "
            "one machine whose GPUs have peer access"
        ) from error


class Communicator:
    """A communicator of NCCL, whose library is loaded at run time."""

    def __init__(self, library: ctypes.CDLL, comm: Comm) -> None:
        """All ranks of `comm` make it together, each on the GPU that is current in its thread."""
        self._library = library
        unique = (ctypes.c_byte * _UNIQUE_ID_BYTES)()
        if comm.rank == 0:
            self._check(library.ncclGetUniqueId(unique), "ncclGetUniqueId")
        identity = comm.broadcast(bytes(unique))
        handle = ctypes.c_void_p()

        class UniqueId(ctypes.Structure):
            _fields_ = (("internal", ctypes.c_byte * _UNIQUE_ID_BYTES),)

        library.ncclCommInitRank.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int,
            UniqueId,
            ctypes.c_int,
        ]
        status = library.ncclCommInitRank(
            ctypes.byref(handle), comm.size, UniqueId.from_buffer_copy(identity), comm.rank
        )
        self._check(status, "ncclCommInitRank")
        assert handle.value is not None
        self.address = handle.value

    def close(self) -> None:
        self._check(self._library.ncclCommDestroy(ctypes.c_void_p(self.address)), "ncclCommDestroy")

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            self._library.ncclGetErrorString.restype = ctypes.c_char_p
            reason = self._library.ncclGetErrorString(status).decode()
            raise TargetError(f"NCCL failed in {what}: {reason}")


def communicator(
    plan: RankPlan, topology: Topology, comm: Comm, device: Device
) -> Communicator | None:
    """The communicator of the tensor-parallel group, where the plan's engines communicate by
    themselves. Raises TargetError where NCCL is missing or cannot join these ranks."""
    if plan.in_engine_ranks == 1:
        return None
    group = comm.split(topology.stage(comm.rank))
    rebuild = "build the engine again with --primitives, which leaves collectives to llmforge"
    if len(set(group.gather(device.identity))) < group.size:
        raise TargetError(
            "several ranks of this engine share a GPU, which NCCL does not allow; give each rank a "
            f"GPU of its own, or {rebuild}"
        )
    for name in ("libnccl.so.2", "libnccl.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return Communicator(library, group)
    raise TargetError(
        "this engine's ranks communicate through NCCL, and libnccl.so.2 is not found; install it "
        f"(pip install nvidia-nccl-cu13) and add its directory to LD_LIBRARY_PATH, or {rebuild}"
    )
