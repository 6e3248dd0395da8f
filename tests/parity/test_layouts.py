"""Every parallel layout gives the tokens of one rank, in float32, greedy and sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import BY_NAME, CASES, MAX_POSITION, VOCABULARY
from thread_comm import run_ranks

from llmforge.checkpoint.convert import convert
from llmforge.comm import Comm
from llmforge.engine.build import build
from llmforge.engine.step import SamplingParams
from llmforge.engine.store import Engine
from llmforge.engine.target import target
from llmforge.runtime.generate import follow, generate
from llmforge.runtime.requests import Request
from llmforge.settings import BuildSettings, ConvertSettings

LAYOUTS = [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
SAMPLED = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2,
    presence_penalty=0.1, seed=5,
)  # fmt: skip


LENGTHS = (1, 3, 14, 9, 25, 2)


def requests(lengths: tuple[int, ...]) -> list[Request]:
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(VOCABULARY, size=n).tolist()) for n in lengths]
    return [
        Request(i, prompt, 10, SAMPLED if i % 2 else SamplingParams())
        for i, prompt in enumerate(prompts)
    ]


def run(
    directory: Path,
    tensor: int,
    pipeline: int,
    lengths: tuple[int, ...] = LENGTHS,
    experts: int = 1,
) -> list[tuple[int, ...]]:
    """The tokens that an engine of this layout generates, ranks as threads."""
    output = directory / f"engine-{tensor}-{pipeline}-{experts}"
    settings = BuildSettings(
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        expert_parallel=experts,
        max_batch_size=4,
        max_seq_len=MAX_POSITION,
        max_num_tokens=16,
        block_size=4,
    )
    build(directory / "checkpoint", output, settings)
    engine = Engine.open(output)

    def rank(comm: Comm) -> list[tuple[int, ...]]:
        executable = target("cpu").load(
            engine.rank_directory(comm.rank), engine.topology, engine.limits, comm
        )
        if comm.rank != 0:
            follow(executable, comm)
            return []
        completions = generate(executable, comm, requests(lengths), vocab_size=VOCABULARY)
        return [completion.token_ids for completion in completions]

    return run_ranks(engine.topology.world_size, rank)[0]


# One kv head (replicated), biases on row-parallel layers, tied embeddings, windows, qk-norm.
@pytest.mark.parametrize(
    "name", ["llama", "llama-one-kv-head", "llama-biases", "qwen2-tied", "qwen3-tied-bias"]
)
def test_every_layout_gives_the_tokens_of_one_rank(name: str, tmp_path: Path) -> None:
    BY_NAME[name].save(tmp_path / "hf", torch.float32)
    convert(str(tmp_path / "hf"), tmp_path / "checkpoint", ConvertSettings())
    expected = run(tmp_path, 1, 1)
    for tensor, pipeline in LAYOUTS:
        assert run(tmp_path, tensor, pipeline) == expected, (tensor, pipeline)


# What every layout above is tried on is left out; of the others each has its own fields.
# (Mixtures are below.)
OTHERS = [
    case.name
    for case in CASES
    if case.every_expert is None and not case.name.startswith(("llama", "qwen"))
]


@pytest.mark.parametrize("name", OTHERS)
def test_two_ranks_give_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    BY_NAME[name].save(tmp_path / "hf", torch.float32)
    convert(str(tmp_path / "hf"), tmp_path / "checkpoint", ConvertSettings())
    expected = run(tmp_path, 1, 1, LENGTHS[2:5])
    for tensor, pipeline in ((2, 1), (1, 2)):
        assert run(tmp_path, tensor, pipeline, LENGTHS[2:5]) == expected, (tensor, pipeline)


MIXED = [case.name for case in CASES if case.every_expert is not None]


@pytest.mark.parametrize("name", MIXED)
def test_experts_on_several_ranks_give_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    """Two groups of one rank, and two of two with the stages of a pipeline behind them."""
    BY_NAME[name].save(tmp_path / "hf", torch.float32)
    convert(str(tmp_path / "hf"), tmp_path / "checkpoint", ConvertSettings())
    lengths = LENGTHS[2:5]
    expected = run(tmp_path, 1, 1, lengths)
    for layout in ((2, 1), (1, 2)):
        assert run(tmp_path, *layout, lengths) == expected, layout
    for layout in ((2, 1), (4, 1), (2, 2)):
        assert run(tmp_path, *layout, lengths, experts=2) == expected, layout
