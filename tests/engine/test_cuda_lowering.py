"""Programs of the cuda target for engines of several ranks, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from cuda_models import LIMITS, MODELS, of_dtype
from thread_comm import run_ranks

from llmforge.comm import Comm
from llmforge.engine.cuda.lowering import LOWERINGS
from llmforge.engine.cuda.program import Links, Program, Transfer
from llmforge.engine.cuda.target import CudaTarget, programs
from llmforge.errors import BuildError, TargetError
from llmforge.kernels.collectives import GROUP, HEADER_BYTES, MAIL, MAX_BLOCKS
from llmforge.kernels.exchange import Peers, SharedRegions, peers_of, reaches_peers
from llmforge.kernels.launch import Launch, Size
from llmforge.model.decoder import trace
from llmforge.model.graph import Graph
from llmforge.model.ops import OPS
from llmforge.parallel import Topology

NCCL = Links(group=False, messages=False)


def prepared(name: str, tensor: int, pipeline: int, rank: int, dtype: str = "bfloat16") -> Graph:
    config = of_dtype(MODELS[name], dtype)
    return CudaTarget().prepare(trace(config, Topology(tensor, pipeline), rank))


def entries(program: Program) -> list[str]:
    """The kernels and transfers of a program, in order."""
    calls = (i.call for i in program.instructions)
    return [
        c.kernel.entry
        if isinstance(c, Launch)
        else c.kind
        if isinstance(c, Transfer)
        else type(c).__name__
        for c in calls
    ]


def test_every_op_has_a_row() -> None:
    assert set(LOWERINGS) == set(OPS)


@pytest.mark.parametrize(
    ("layout", "links"), [((2, 1), Links()), ((1, 2), Links()), ((2, 2), NCCL)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_lowers_in_every_layout(
    name: str, layout: tuple[int, int], links: Links
) -> None:
    tensor, pipeline = layout
    if MODELS[name].num_heads % tensor:
        pytest.skip("its heads do not divide")
    for rank in range(tensor * pipeline):
        graph = prepared(name, tensor, pipeline, rank)
        for program in programs(graph, LIMITS, "sm_90", links):
            computed = {t for i in program.instructions for t in i.tensors}
            assert set(graph.outputs) <= computed, "the outputs are computed"
            wanted = [n.op for n in graph.nodes].count("all_reduce")
            assert entries(program).count("all_reduce") == wanted, "one kernel an all-reduce"
            if tensor > 1:
                assert program.group_slot > 0
            assert (program.mail_slot > 0) == (pipeline > 1 and links.messages)


def test_residual_and_norm_are_part_of_the_all_reduce() -> None:
    general, *decodes = programs(prepared("llama", 2, 1, 0), LIMITS, "sm_80")
    for program in (general, *decodes):
        assert entries(program).count("elementwise") == 2, "the gated activations alone"
        joined = [
            dict(i.call.kernel.defines)
            for i in program.instructions
            if isinstance(i.call, Launch) and i.call.kernel.entry == "all_reduce"
        ]
        # The embedding, then two of each layer, normed in the same kernel but for the last.
        assert [(d["ADD"], d["NORM"]) for d in joined] == [(0, 0), *[(1, 1)] * 3, (1, 0)]


def test_biases_of_row_parallel_products_are_part_of_it_too() -> None:
    program, *_ = programs(prepared("all-biases", 2, 1, 1), LIMITS, "sm_90")
    joined = [i.call for i in program.instructions if isinstance(i.call, Launch)]
    biased = [dict(c.kernel.defines)["BIAS"] for c in joined if c.kernel.entry == "all_reduce"]
    assert biased == [0, 1, 1, 1, 1]


def test_without_shared_memory_ranks_gather_and_sum_for_themselves() -> None:
    program, *_ = programs(prepared("llama", 2, 1, 0), LIMITS, "sm_90", NCCL)
    names = entries(program)
    at = [i for i, name in enumerate(names) if name in ("all_reduce", "all_gather")]
    assert at and all(names[i - 1] == "gather" for i in at)
    first, _ = programs(prepared("llama", 1, 2, 0), LIMITS, "sm_90", NCCL)[:2]
    assert [n for n in entries(first) if n in ("send", "receive")] == ["send", "receive"]


def test_blocks_that_wait_for_other_ranks_are_few() -> None:
    for rank in range(2):
        for program in programs(prepared("wide", 2, 1, rank), LIMITS, "sm_90"):
            for call in (i.call for i in program.instructions):
                if isinstance(call, Launch) and "RANKS" in dict(call.kernel.defines):
                    assert isinstance(call.grid[0], Size) and call.grid[0].most == MAX_BLOCKS


def test_ranks_of_a_group_make_the_same_exchanges() -> None:
    for name, links in itertools.product(("wide-biases", "qwen3-qk-norm"), (Links(), NCCL)):
        of_rank = [programs(prepared(name, 2, 1, rank), LIMITS, "sm_90", links) for rank in (0, 1)]
        for left, right in zip(*of_rank, strict=True):
            assert entries(left) == entries(right)
            assert (left.group_slot, left.arena) == (right.group_slot, right.arena)


def test_whom_ranks_work_with() -> None:
    topology = Topology(2, 3)
    assert peers_of(0, topology) == Peers((0, 1), to=2, source=4)
    assert peers_of(1, topology) == Peers((0, 1), to=3, source=None)
    assert peers_of(3, topology) == Peers((2, 3), to=5, source=1)
    assert peers_of(4, topology) == Peers((4, 5), to=0, source=2)
    assert peers_of(5, topology) == Peers((4, 5), to=None, source=3)
    assert peers_of(0, Topology()) == Peers()
    assert peers_of(1, Topology(1, 2)) == Peers((), to=0, source=0)


class HostMemory:
    """GPU memory stood in for by the process's own."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}

    def allocate(self, nbytes: int) -> int:
        array = np.zeros(nbytes, np.uint8)
        self.arrays[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: int) -> None:
        del self.arrays[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        self.arrays[address][:] = array.view(np.uint8)

    def synchronize(self) -> None: ...

    def share(self, address: int) -> bytes:
        return address.to_bytes(8, "little")

    def open_shared(self, handle: bytes) -> int:
        raise AssertionError("ranks of one process need not open anything")

    def close_shared(self, address: int) -> None: ...


def test_every_rank_has_the_addresses_of_its_peers() -> None:
    topology = Topology(2, 2)

    def work(comm: Comm) -> tuple[list[int], list[int]]:
        memory = HostMemory()
        peers = peers_of(comm.rank, topology)
        regions = SharedRegions(memory, comm, peers, 256 * (1 + comm.rank // 2), 512)
        group, mail = (
            memory.arrays[regions.addresses[o.buffer]].view(np.uint64).tolist()
            for o in (GROUP, MAIL)
        )
        regions.close()
        assert not memory.arrays, "all is given back"
        return group, mail

    groups, mails = zip(*run_ranks(4, work), strict=True)
    assert groups[0] == groups[1] != groups[2] == groups[3]
    own = [mail[0] for mail in mails]
    assert [mail[1:] for mail in mails] == [
        [own[2], own[2]],
        [own[3], 0],
        [own[0], own[0]],
        [0, own[1]],
    ]
    offsets = [own[r] - groups[r][r % 2] for r in range(4)]
    assert offsets == [HEADER_BYTES + 512] * 2 + [HEADER_BYTES + 1024] * 2


def test_all_ranks_know_when_one_cannot_reach_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SharedRegions._open

    def failing(self, card, own):
        if self._comm.rank == 1:
            raise TargetError("no peer access")
        return opened(self, card, own)

    monkeypatch.setattr(SharedRegions, "_open", failing)
    answers = run_ranks(2, lambda comm: reaches_peers(HostMemory(), comm, Peers((0, 1))))
    assert answers == [False, False]


def test_memory_counts_what_ranks_share() -> None:
    limits = dataclasses.replace(LIMITS, max_num_tokens=2048)
    graph = prepared("llama", 2, 1, 0)
    one = CudaTarget().memory(graph, limits).activations
    arena = max(p.arena_bytes for p in programs(graph, limits, "compute_80"))
    assert one - arena == 2 * 2 * 2048 * 64 * 2, "two slots, each with the hidden state of both"


def test_a_router_beyond_the_kernel_is_refused_at_build() -> None:
    moe = dataclasses.replace(MODELS["experts"].moe, num_experts=40, top_k=33)
    config = dataclasses.replace(MODELS["experts"], moe=moe)
    with pytest.raises(
        BuildError, match=r"choose experts like this model \(top_k 33, at most 32\)"
    ):
        CudaTarget().prepare(trace(config, Topology(), 0))


def test_few_tokens_stream_their_experts_and_more_are_sorted_by_expert() -> None:
    limits = dataclasses.replace(LIMITS, max_batch_size=32)
    config = of_dtype(MODELS["experts"], "bfloat16")
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    for program in programs(graph, limits, "sm_90"):
        streamed = program.shape.decode and program.shape.tokens <= 8
        assert ("expert_up" in entries(program)) == streamed
        assert ("sort_pairs" in entries(program)) == (not streamed)
