"""Networks of a model against its reference: both get the same prefills, chunks and decodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorrt_rtx
import torch
from network_rank import NetworkRank, call_inputs
from network_reader import Program, read
from thread_comm import run_ranks
from tiny_models import ONE, MemoryCheckpoint, Reference, batch_of

from llmforge.checkpoint.config import ModelConfig
from llmforge.comm import Comm
from llmforge.engine.step import Limits
from llmforge.engine.tensorrt.lowering.rank import RankLowering
from llmforge.engine.tensorrt.package import Features, Package
from llmforge.engine.tensorrt.plan import RankPlan
from llmforge.engine.tensorrt.weight_file import WeightFile
from llmforge.model.decoder import trace
from llmforge.model.passes import Pass, apply
from llmforge.parallel import Topology
from llmforge.runtime.verify import logit_tolerance

# Two sequences, the second longer than what the cases' rotary embeddings were trained on, which is
# cut into chunks; slot 2 is free throughout.
PROMPTS = (5, 21)
DECODES = 8
LIMITS = Limits(max_batch_size=3, max_seq_len=32, max_num_tokens=24, block_size=32, num_blocks=3)
# A call: (sequence, start, stop) for each row; decode calls have a row a slot.
Chunks = tuple[tuple[int, int, int], ...]
PREFILLS: tuple[Chunks, ...] = (((1, 0, 9),), ((0, 0, PROMPTS[0]),), ((1, 9, PROMPTS[1]),))


def decode(step: int) -> Chunks:
    return tuple((s, n + step, n + step + 1) for s, n in enumerate(PROMPTS))


SCRIPT = (*PREFILLS, *map(decode, range(DECODES)))


@dataclass(frozen=True)
class Lowered:
    """A rank's networks, read back."""

    plan: RankPlan
    programs: dict[str, Program]
    weights: bytes


@dataclass(frozen=True)
class FewLayers(Features):
    """A package whose engines are better small."""

    layers: int

    @property
    def layers_per_engine(self) -> int:
        return self.layers


class HeldFile:
    """A WrittenFile in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    @property
    def size(self) -> int:
        return len(self.data)

    def write(self, data: memoryview) -> None:
        self.data += data


def lower(
    checkpoint: MemoryCheckpoint,
    *,
    primitives: bool,
    topology: Topology = ONE,
    passes: tuple[Pass, ...] = (),
    layers: int | None = None,
    apart: bool = False,
    features: Mapping[str, bool] = MappingProxyType({}),
) -> list[Lowered]:
    """Every rank's networks. The target lowers graphs as they are traced; `passes` are applied
    first where rows are to be seen that it has besides. layers: the most of an engine. apart:
    weights are inputs. features: what the package has or lacks, other than it does."""
    lowered = []
    for rank in range(topology.world_size):
        graph = apply(trace(checkpoint.config, topology, rank), passes)
        weights = checkpoint.of_rank(topology, rank)
        package = Package("tensorrt-rtx", tensorrt_rtx)
        package.features = replace(package.features, **features)
        if layers is not None:
            package.features = FewLayers(**asdict(package.features), layers=layers)
        file = HeldFile()
        lowering = RankLowering(
            graph,
            LIMITS,
            weights,
            package,
            primitives=primitives,
            apart=WeightFile(file) if apart else None,  # type: ignore[arg-type]
        )
        programs = {
            engine.step.file: read(engine.network.network, tensorrt_rtx)
            for engine in lowering.engines()
        }
        lowered.append(Lowered(lowering.plan((), ""), programs, bytes(file.data)))
    return lowered


def tokens_of(config: ModelConfig) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(5)
    return [rng.integers(config.vocab_size, size=n + DECODES).astype(np.int32) for n in PROMPTS]


def reference_logits(checkpoint: MemoryCheckpoint) -> list[torch.Tensor]:
    """What each call of the script gives, by the reference on one rank."""
    reference, tokens = Reference(checkpoint, LIMITS), tokens_of(checkpoint.config)
    return [reference.logits(batch_of(tokens, chunks, PROMPTS)) for chunks in SCRIPT]


def network_logits(
    config: ModelConfig, lowered: list[Lowered], topology: Topology = ONE
) -> list[torch.Tensor]:
    """What each call gives on rank 0, ranks as threads."""
    tokens = tokens_of(config)

    def work(comm: Comm) -> list[torch.Tensor]:
        mine = lowered[comm.rank]
        group = comm.split(topology.stage(comm.rank)) if topology.tensor_parallel > 1 else None
        rank = NetworkRank(mine.plan, mine.programs, comm, group, mine.weights)
        return [_call(rank, tokens, chunks) for chunks in SCRIPT]  # type: ignore[misc]

    return run_ranks(topology.world_size, work)[0]


def _call(
    rank: NetworkRank, tokens: list[np.ndarray[Any, Any]], chunks: Chunks
) -> torch.Tensor | None:
    capacity = rank.plan.capacity
    if chunks not in PREFILLS:
        # All slots take part; the free one, of which nothing is known, computes a token for nobody.
        batch = LIMITS.max_batch_size
        ids, past, prompts = np.zeros((batch, 1), int), np.zeros(batch, int), np.ones(batch, int)
        for s, start, stop in chunks:
            ids[s], past[s], prompts[s] = tokens[s][start:stop], start, PROMPTS[s]
        inputs = call_inputs(ids, past, prompts, np.arange(batch), capacity)
        logits = rank.call(0, **inputs)
        return None if logits is None else logits[: len(chunks)]
    ((s, start, stop),) = chunks
    ids, past = tokens[s][None, start:stop], np.array([start])
    rows = np.array([stop - start - 1])
    return rank.call(s, **call_inputs(ids, past, np.array([PROMPTS[s]]), rows, capacity))


@dataclass(frozen=True)
class Difference:
    """The largest difference between logits, and what rounding explains."""

    largest: float
    tolerance: float

    @property
    def within(self) -> bool:
        return self.largest <= self.tolerance


def compare(
    config: ModelConfig, got: list[torch.Tensor], expected: list[torch.Tensor]
) -> Difference:
    """NaN is a difference without bound."""
    joined, wanted = torch.cat(got), torch.cat(expected)
    assert joined.shape == wanted.shape and joined.dtype == torch.float32
    scale = wanted.double().square().mean().sqrt().item()
    largest = (joined.double() - wanted.double()).abs().max().item()
    return Difference(math.inf if math.isnan(largest) else largest, logit_tolerance(config, scale))
