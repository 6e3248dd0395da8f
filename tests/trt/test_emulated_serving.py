"""The scheduler and the real executable on an emulation of TensorRT: token for token what the cpu
target gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulated_target import Rig
from tiny_models import ONE, MemoryCheckpoint, config_of

from llmforge.comm import LocalComm
from llmforge.engine.cpu.target import CpuTarget
from llmforge.engine.step import Limits, SamplingParams
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.runtime.generate import generate
from llmforge.runtime.requests import Request

# A slot a sequence; prompts longer than max_num_tokens are cut into chunks.
LIMITS = Limits(max_batch_size=3, max_seq_len=40, max_num_tokens=8, block_size=48, num_blocks=3)
CPU_LIMITS = Limits(max_batch_size=3, max_seq_len=40, max_num_tokens=8, block_size=4, num_blocks=30)
SAMPLED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=5)
LENGTHS = (1, 3, 14, 9, 25, 2, 8)


def requests_of(vocab_size: int) -> list[Request]:
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(vocab_size, size=n).tolist()) for n in LENGTHS]
    return [
        Request(i, prompt, 7 + i, SAMPLED if i % 2 else SamplingParams())
        for i, prompt in enumerate(prompts)
    ]


def by_cpu(
    directory: Path, checkpoint: MemoryCheckpoint, requests: list[Request]
) -> list[tuple[int, ...]]:
    target, out = CpuTarget(), directory / "cpu"
    out.mkdir()
    graph = target.prepare(trace(checkpoint.config, ONE, 0))
    target.compile(graph, checkpoint.of_rank(ONE, 0), CPU_LIMITS, out)
    executable = target.load(out, ONE, CPU_LIMITS, LocalComm())
    vocab_size = checkpoint.config.vocab_size
    completions = generate(executable, LocalComm(), requests, vocab_size=vocab_size)
    return [completion.token_ids for completion in completions]


LAYOUTS = {"one": ONE, "tp2": Topology(2, 1), "pp2": Topology(1, 2), "tp2-pp2": Topology(2, 2)}


@pytest.mark.parametrize("primitives", [False, True], ids=["native", "primitives"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama"])
def test_tokens_are_those_of_the_cpu_target(
    name: str, layout: str, primitives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, topology = MemoryCheckpoint(config_of(name)), LAYOUTS[layout]
    requests = requests_of(checkpoint.config.vocab_size)
    rig = Rig(monkeypatch)
    rig.build(tmp_path, checkpoint, LIMITS, topology, primitives=primitives)
    expected = by_cpu(tmp_path, checkpoint, requests)
    vocab_size = checkpoint.config.vocab_size
    assert rig.serve(tmp_path, topology, LIMITS, requests, vocab_size) == expected
