"""The kernels that join ranks, on emulated GPUs: ranks are threads, which write into each other's
regions and wait for each other within the kernels."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.device import EmulatedMemory
from exchange_rounds import one_round, random_round, whole
from thread_comm import run_ranks

from llmforge.comm import Comm
from llmforge.kernels import collectives
from llmforge.kernels.collectives import GROUP_SLOT, MAIL_SLOT, TENSOR_RANK, Collective
from llmforge.kernels.exchange import Peers, SharedRegions, slot_units

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


class RankBench(Bench):
    """One rank's launches; it sends to the next rank and hears from the one before."""

    def __init__(self, comm: Comm, slot: int) -> None:
        super().__init__(0, (TENSOR_RANK, GROUP_SLOT, MAIL_SLOT))
        self.comm = comm
        ranks, units = comm.size, slot_units(slot)
        ring = Peers(tuple(range(ranks)), (comm.rank + 1) % ranks, (comm.rank - 1) % ranks)
        self.regions = SharedRegions(EmulatedMemory(), comm, ring, 16 * units, 16 * units)
        for name, value in ((TENSOR_RANK, comm.rank), (GROUP_SLOT, units), (MAIL_SLOT, units)):
            self.sizes.set(name, value)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def run(self, made: Collective, rows: int) -> None:
        super().run(made.launch, tokens=rows)

    def address(self, name: str) -> int:
        return self.regions.addresses.get(name) or super().address(name)


ROUNDS = (  # kind, dtype, features, the most rows, rows
    ("reduce", "float32", 36, 4, 3),
    ("norm", "bfloat16", 1000, 4, 4),
    ("gather", "float16", 64, 4, 3),
    ("message", "bfloat16", 2048, 40, 33),
    ("broadcast", "float32", 1, 600, 511),
    ("reduce", "bfloat16", 4096, 80, 70),  # from three ranks on they share the work
    ("norm", "float16", 2048, 150, 130),  # more rows than blocks
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchanges(ranks):
    def work(comm: Comm) -> None:
        bench = RankBench(comm, 4 << 20)
        for number, (kind, dtype, features, most, rows) in enumerate(ROUNDS):
            for again in range(3):  # slots are used in turn
                one_round(bench, kind, dtype, features, most, rows, 1000 * number + 10 * again)
        bench.regions.close()

    run_ranks(ranks, work)


def test_a_sender_waits_for_a_receiver_that_is_slow():
    """A mailbox has room for two messages; the others must not overwrite them."""
    rows, count = 5, 6
    sent = [torch.full((rows, 64), float(number)) for number in range(count)]

    def work(comm: Comm) -> list[float]:
        bench = RankBench(comm, 1 << 20)
        received = []
        for number in range(count):
            bench.tensors["x"] = sent[number].clone() if comm.rank == 0 else torch.zeros(rows, 64)
            operand = whole("x", "tokens", 64, dtype="float32")
            if comm.rank == 0:
                bench.run(collectives.send(operand, rows), rows)
            else:
                time.sleep(0.1)
                bench.run(collectives.receive(operand, rows), rows)
                received.append(float(bench.tensors["x"].unique()))
        bench.regions.close()
        return received

    assert run_ranks(2, work)[1] == [float(number) for number in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_exchanges(ranks):
    def work(comm: Comm) -> None:
        bench, rng = RankBench(comm, 16 << 20), np.random.default_rng(5)
        for number in range(40):
            random_round(bench, rng, seed=1000 * number)
        bench.regions.close()

    run_ranks(ranks, work)
